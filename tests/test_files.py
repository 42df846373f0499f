"""The one way to write: whole or not at all, through no link, and never waiting for a pipe."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dexport import files
from dexport.bundle import MANIFEST, Draft, change_manifest, load_bundle
from dexport.drafts import clear_remains
from dexport.errors import InputError, MachineError, UsageError
from dexport.files import amount, exchange, move_new, open_regular, outside_drafts, replacing, write_whole

ROOT = Path(__file__).parents[1]


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_whole(target, "one")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), replacing(target) as file:
            file.write(b"half")
            raise error
    assert target.read_text() == "one"
    write_whole(target, b"two")
    assert target.read_text() == "two"
    assert names_in(target.parent) == ["a.json"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, code: int) -> None:
    write_whole(tmp_path / "a", "one")
    with pytest.raises(MachineError, match=f"{tmp_path} cannot be written"), replacing(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    assert names_in(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "one"


def test_names_are_drawn_so_that_nothing_can_lie_in_wait(tmp_path: Path) -> None:
    """What used to be the fixed names of drafts leads to a victim; and the drawn ones do not repeat."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    drawn = {files.draft_of(tmp_path / "a.png") for _ in range(100)}
    assert len(drawn) == 100
    for name in (".a.png.partial", "a.partial", "a.png.part", ".a.png.partial-"):
        (tmp_path / name).symlink_to(victim)
    write_whole(tmp_path / "a.png", "new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "a.png").read_text() == "new"


def test_a_drawn_name_that_is_taken_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.partial-00000000").symlink_to(victim)
    os.mkfifo(tmp_path / ".a.partial-11111111")
    draws = iter(["00000000", "11111111", "22222222"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(draws))
    write_whole(tmp_path / "a", "new")
    assert victim.read_text() == "precious"


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to(os.devnull)


def make_link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_link_to_a_device, make_link_to_a_folder])
def test_only_files_are_replaced_and_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "x"
    make(target)
    before = target.lstat()
    with pytest.raises(UsageError, match="is no regular file"):
        write_whole(target, "new")
    with pytest.raises(OSError, match=r"Not a regular file|Is a directory"):
        open_regular(target)
    assert target.lstat() == before
    assert names_in(tmp_path) == ["x"]


def test_a_link_to_a_file_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x").symlink_to("victim")
    write_whole(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "x").is_symlink() and (tmp_path / "x").read_text() == "new"
    (tmp_path / "y").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic"):
        open_regular(tmp_path / "y", follow=False)
    with open_regular(tmp_path / "y") as file:
        assert file.read() == b"precious"


@pytest.mark.parametrize("renameat2", [True, False])
@pytest.mark.parametrize("make", [make_folder, lambda path: path.write_text("x"), lambda path: path.symlink_to("gone")])
def test_a_move_replaces_nothing(
    tmp_path: Path, make: Callable[[Path], object], renameat2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not renameat2:
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    for name, source in (("f", tmp_path / "file"), ("d", tmp_path / "folder")):
        source.mkdir() if name == "d" else source.write_text("mine")
        make(tmp_path / name)
        before = (tmp_path / name).lstat()
        with pytest.raises(FileExistsError):
            move_new(source, tmp_path / name)
        assert (tmp_path / name).lstat() == before and source.exists()
        move_new(source, tmp_path / f"{name}2")
        assert not source.exists() and (tmp_path / f"{name}2").exists()


def test_an_exchange_says_whether_the_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert names_in(tmp_path / "a") == ["b"]
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    assert not exchange(tmp_path / "a", tmp_path / "b")


def test_sizes_for_people() -> None:
    assert [amount(n) for n in (0, 812, 1_500, 3_200_000, 1_500_000_000)] == [
        "0 bytes",
        "812 bytes",
        "1.5 kB",
        "3.2 MB",
        "1.5 GB",
    ]


def test_messages_name_no_draft() -> None:
    inner = Path("/d/.out.partial-0123abcd/parts/.decoder.partial-89abcdef/reports")
    assert outside_drafts(inner) == Path("/d")
    assert outside_drafts(Path("/d/out")) == Path("/d/out")


# Manifests


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with Draft(tmp_path / "b") as draft:
        draft.write_text("model.onnx", "graph")
        return draft.commit({"status": "passed"}).path


def test_readers_always_see_a_whole_manifest(bundle: Path) -> None:
    loaded, stop, failures = load_bundle(bundle), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads((bundle / MANIFEST).read_bytes())
            except (OSError, ValueError) as error:
                failures.append(error)

    def write(number: int) -> None:
        for turn in range(40):
            change_manifest(loaded, validation={"number": number, "turn": turn, "filling": "x" * 10_000})

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert failures == []
    assert load_bundle(bundle).manifest["validation"]["turn"] == 39
    assert names_in(bundle) == [MANIFEST, "model.onnx"]


def test_links_in_an_unpacked_bundle_are_not_written_through(bundle: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    loaded = load_bundle(bundle)
    (bundle / f".{MANIFEST}.partial").symlink_to(victim)
    os.mkfifo(bundle / f".{MANIFEST}.partial-")
    change_manifest(loaded, validation={})
    assert victim.read_text() == "precious"
    with pytest.raises(InputError, match="not in the manifest"):
        load_bundle(bundle)


@pytest.mark.parametrize("make", [make_pipe, make_link_to_a_device, make_folder])
def test_only_a_file_passes_for_an_unfinished_manifest(bundle: Path, make: Callable[[Path], None]) -> None:
    make(bundle / f".{MANIFEST}.partial-0123abcd")
    if make is not make_folder:
        with pytest.raises(InputError, match="not in the manifest"):
            load_bundle(bundle)


def test_nothing_unfinished_is_tolerated_beside_a_signature(bundle: Path) -> None:
    remains = bundle / f".{MANIFEST}.partial-0123abcd"
    remains.write_text("half")
    load_bundle(bundle)
    (bundle / f"{MANIFEST}.sig").write_text("{}")
    with pytest.raises(InputError, match="not in the manifest"):
        load_bundle(bundle)


def test_files_that_are_being_written_are_no_remains(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dexport.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "writing\n"
        clear_remains(tmp_path, "a")
        assert len(names_in(tmp_path)) == 1
        child.kill()
        child.wait()
    assert len(names_in(tmp_path)) == 1
    clear_remains(tmp_path, "b")
    assert len(names_in(tmp_path)) == 1
    clear_remains(tmp_path)
    assert names_in(tmp_path) == []


def test_no_other_way_to_write_is_left() -> None:
    """Fixed names of drafts, and files renamed elsewhere than in :mod:`dexport.files`."""
    found = {
        path.name
        for path in (ROOT / "dexport").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if '.partial"' in line or '.part"' in line or "draft.replace(" in line or "os.replace(" in line
    }
    assert found == {"files.py"}
