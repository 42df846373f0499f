"""Locks are held by open files of live processes, for a bounded time, and their files go away."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dexport import locks
from dexport.errors import MachineError
from dexport.locks import guarding, open_lock, try_lock, wait_for_lock


def test_one_holds_it_and_the_file_goes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with guarding(output) as held:
        assert held
        assert [entry.name for entry in tmp_path.iterdir()] == [".out.lock"]
        with (
            pytest.raises(MachineError, match=r"another process has held .*\.out\.lock for 0\.1 s"),
            guarding(output, 0.1),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_holder_removes_is_not_the_lock(tmp_path: Path) -> None:
    """Many who come and go are never two at once."""
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(50):
            with guarding(tmp_path / "out"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_drops_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dexport.locks import guarding\n"
        "with guarding(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(MachineError, match="another process has held"), guarding(tmp_path / "out", 0.05):
            pass
        child.kill()
        child.wait()
    with guarding(tmp_path / "out", 0.05) as held:
        assert held
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("elsewhere"), lambda path: path.mkdir(), lambda p: p.symlink_to(p)]
)
def test_what_a_stranger_put_there_is_neither_followed_nor_waited_for(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    lock = tmp_path / ".out.lock"
    make(lock)
    before = lock.lstat()
    with guarding(tmp_path / "out") as held:
        assert not held
    assert lock.lstat() == before
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with guarding(tmp_path / "out") as held:
        assert not held
    assert list(tmp_path.iterdir()) == []


def test_a_wait_is_bounded_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "QUIET_S", 0.05)
    one, other, told = open_lock(tmp_path / "l"), open_lock(tmp_path / "l"), []
    assert try_lock(one, shared=True)
    assert try_lock(other, shared=True)
    assert not wait_for_lock(one, 0.2, on_wait=lambda: told.append(1))
    assert told == [1]
    os.close(other)
    assert wait_for_lock(one, 0.2)
    os.close(one)
