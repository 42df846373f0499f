"""Places that are looked at before any work, and folders that one process fills at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dexport.errors import UsageError
from dexport.places import check_place, filling


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "file/below", "fifo", "a" * 300, "nul\0"):
        with pytest.raises(UsageError) as refused:
            check_place(tmp_path / name)
        assert "\0" not in str(refused.value)
    for name in ("file", "new", "new/below/it"):
        check_place(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file", "folder"]


def test_one_fills_a_folder(tmp_path: Path) -> None:
    with filling(tmp_path / "a"):
        with pytest.raises(UsageError, match="is being filled by another run"), filling(tmp_path / "a"):
            pass
        with filling(tmp_path / "b"):
            pass
    with filling(tmp_path / "a"):
        pass


def test_the_lock_of_a_killed_process_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dexport.places import filling\n"
        "with filling(Path(sys.argv[1])): print('in', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(UsageError, match="another run"), filling(tmp_path):
        pass
    process.kill()
    process.communicate()
    with filling(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("dexport.locks.fcntl.flock", refuse)
    with filling(tmp_path), filling(tmp_path):
        pass
