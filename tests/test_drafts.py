"""Outputs are published by renames that replace nothing unasked; drafts are known by what is alive."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dexport import drafts, files
from dexport.bundle import Bundle, Draft, copy_bundle, load_bundle
from dexport.drafts import ALIVE, LiveFolder, clear_remains, is_mount_point, output_folder
from dexport.errors import InputError, MachineError, UsageError

ROOT = Path(__file__).parents[1]
WITHOUT_RENAMEAT2 = pytest.param(False, id="plain renames")
WITH_RENAMEAT2 = pytest.param(True, id="renameat2")


def write_bundle(output: Path, text: str = "graph", *, force: bool = False) -> Bundle:
    with Draft(output, force=force) as draft:
        draft.write_text("model.onnx", text)
        draft.write_text("reports/deep/parity.json", text)
        return draft.commit({"status": "passed"})


def text_of(bundle: Path) -> str:
    return (load_bundle(bundle).path / "model.onnx").read_text()


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(params=[WITH_RENAMEAT2, WITHOUT_RENAMEAT2])
def _renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(files, "_renameat2", lambda: None)


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("precious")


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_bundle(path: Path) -> None:
    write_bundle(path, "another")


# What is put at the output while a build runs


@pytest.mark.usefixtures("_renames")
@pytest.mark.parametrize("make", [an_empty_folder, a_folder, a_file, a_link, a_bundle])
def test_without_force_nothing_that_came_meanwhile_is_touched(output: Path, make: Callable[[Path], None]) -> None:
    with pytest.raises(UsageError, match="exists already"), Draft(output) as draft:
        draft.write_text("model.onnx", "mine")
        make(output)
        before = output.lstat()
        draft.commit({"status": "passed"})
    assert output.lstat() == before
    assert names_in(output.parent) == ["out"]
    if make is a_bundle:
        assert text_of(output) == "another"


@pytest.mark.usefixtures("_renames")
@pytest.mark.parametrize("make", [a_folder, a_file])
def test_with_force_only_a_bundle_that_came_meanwhile_is_replaced(output: Path, make: Callable[[Path], None]) -> None:
    with pytest.raises(UsageError, match="not a dexport bundle"), Draft(output, force=True) as draft:
        make(output)
        before = output.lstat()
        draft.commit({"status": "passed"})
    assert output.lstat() == before
    assert names_in(output.parent) == ["out"]


@pytest.mark.usefixtures("_renames")
@pytest.mark.parametrize("make", [an_empty_folder, a_bundle])
def test_with_force_the_last_one_wins(output: Path, make: Callable[[Path], None]) -> None:
    with Draft(output, force=True) as draft:
        draft.write_text("model.onnx", "mine")
        make(output)
        draft.commit({"status": "passed"})
    assert text_of(output) == "mine"
    assert names_in(output.parent) == ["out"]


@pytest.mark.usefixtures("_renames")
def test_what_came_in_the_last_moment_is_given_back(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle when it was looked at, a folder of somebody's own when it was moved away."""
    write_bundle(output)
    looked, may_go = [0], drafts._may_go

    def look(folder: Path, replaceable: Callable[[Path], bool]) -> bool:
        answer = may_go(folder, replaceable)
        looked[0] += 1
        if looked[0] == 3:  # the last look before the renames
            shutil.rmtree(output)
            a_folder(output)
        return answer

    with Draft(output, force=True) as draft:
        looked[0] = 2
        monkeypatch.setattr(drafts, "_may_go", look)
        with pytest.raises(UsageError, match=r"not a dexport bundle|was changed meanwhile"):
            draft.commit({"status": "passed"})
    assert (output / "thesis.tex").read_text() == "precious"
    assert names_in(output.parent) == ["out"]


def test_force_leaves_no_moment_without_a_bundle(output: Path) -> None:
    for name in "ab":
        (output.parent / name).mkdir()
    if not files.exchange(output.parent / "a", output.parent / "b"):
        pytest.skip("this system exchanges no names")
    write_bundle(output)
    stop, missing = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            if not (output / "manifest.json").exists():
                missing.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    for turn in range(30):
        write_bundle(output, str(turn), force=True)
    stop.set()
    looker.join()
    assert missing == []
    assert text_of(output) == "29"


@pytest.mark.parametrize("force", [False, True])
def test_of_builds_at_the_same_time_one_is_there_whole(output: Path, force: bool) -> None:
    code = (
        "import sys\n"
        "from dexport.bundle import Draft\n"
        "from dexport.errors import DexportError\n"
        "try:\n"
        "    with Draft(sys.argv[1], force=sys.argv[2] == 'True') as draft:\n"
        "        draft.write_text('model.onnx', sys.argv[3])\n"
        "        print('ready', flush=True)\n"
        "        sys.stdin.readline()\n"
        "        draft.commit({'status': 'passed'})\n"
        "except DexportError as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", code, str(output), str(force)]
    children = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    codes = []
    for child in children:
        child.communicate()
        codes.append(child.returncode)
    assert sorted(codes) == ([0, 0, 0, 0] if force else [0, 2, 2, 2])
    winner = text_of(output)
    assert force or codes[int(winner)] == 0
    assert names_in(output.parent) == ["out"]


# What cannot be renamed


@pytest.mark.parametrize("seal", [True, False])
def test_a_folder_that_cannot_be_moved_is_filled_anew(
    output: Path, seal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an overlay answers where a folder is of the image below."""
    write_bundle(output, "old")
    (output / "stray").mkdir()
    (output / "stray" / "link").symlink_to(output.parent / "precious")
    (output.parent / "precious").write_text("precious")
    identity = output.stat().st_ino

    def refuse(*_: object) -> bool:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(drafts, "exchange", refuse)
    if seal:
        write_bundle(output, "new", force=True)
        assert text_of(output) == "new"
        assert (output.stat().st_ino, names_in(output)) == (identity, ["manifest.json", "model.onnx", "reports"])
    else:  # killed before the last file: what is there is refused, and can be replaced

        def stop(path: Path, target: Path) -> None:
            if target.name == "manifest.json":
                raise KeyboardInterrupt
            path.rename(target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", stop)
            write_bundle(output, "newer", force=True)
        with pytest.raises(InputError, match="is not what was built"):
            load_bundle(output)
        write_bundle(output, "last", force=True)
        assert text_of(output) == "last"
    assert names_in(output.parent) == ["out", "precious"]


@pytest.mark.parametrize("output", ["", ".", "./", "..", "/", "a/..", "link"])
def test_places_that_cannot_be_replaced(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "a").mkdir(parents=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UsageError, match="which cannot be replaced") as caught:
        Draft(output, force=True)
    assert "-o NAME" in caught.value.hint
    assert names_in(tmp_path) == ["work"] and names_in(tmp_path / "work") == ["a", "link"]


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("x")
    with pytest.raises(UsageError, match="not a dexport bundle"):
        Draft(tmp_path / "x", force=True)
    assert names_in(tmp_path) == ["x"]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    table = tmp_path / "mountinfo"
    spelled = str(place).replace(" ", "\\040")
    table.write_text(f"36 35 98:0 / {spelled} rw,noatime shared:1 - ext4 /dev/root rw\n")
    assert not is_mount_point(place)
    monkeypatch.setattr(drafts, "MOUNTS", table)
    assert is_mount_point(place) and not is_mount_point(tmp_path)
    with pytest.raises(UsageError, match="is a mount point, which cannot be replaced") as caught:
        output_folder(place)
    assert str(place / "NAME") in caught.value.hint


@pytest.mark.parametrize("place", ["/proc", "/sys", "/dev/shm"])
def test_real_mount_points(place: str) -> None:
    if not os.path.ismount(place):
        pytest.skip(f"{place} is no mount point here")
    with pytest.raises(UsageError, match="is a mount point"):
        Draft(place, force=True)


# Who is alive


def test_drafts_of_live_processes_stay_whatever_their_numbers(output: Path) -> None:
    code = (
        "import sys, time\n"
        "from dexport.bundle import Draft\n"
        "draft = Draft(sys.argv[1])\n"
        "print(draft.path, flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    with child.stdout:
        theirs = Path(child.stdout.readline().strip())
        assert str(child.pid) not in theirs.name
        write_bundle(output)
        assert (theirs / ALIVE).is_file()
        child.send_signal(signal.SIGSTOP)  # a stopped one lives
        write_bundle(output, force=True)
        assert theirs.is_dir()
        child.kill()
        child.wait()
    assert theirs.is_dir()
    write_bundle(output, force=True)
    assert names_in(output.parent) == ["out"]


def test_a_draft_goes_with_its_object(output: Path) -> None:
    draft = Draft(output)
    assert len(names_in(output.parent)) == 1
    del draft
    gc.collect()
    assert names_in(output.parent) == []


def test_a_fork_does_not_take_the_draft_along(output: Path) -> None:
    draft = Draft(output)
    child = os.fork()
    if child == 0:
        draft.discard()
        os._exit(0)
    os.waitpid(child, 0)
    assert draft.path.is_dir()
    draft.discard()


def test_where_there_are_no_locks_nobody_is_dead(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = LiveFolder(output)
    monkeypatch.setattr(drafts, "try_lock", lambda *_: None)
    clear_remains(output.parent, "out")
    assert other.path.is_dir()
    write_bundle(output)
    assert other.path.is_dir()
    other.discard()
    assert names_in(output.parent) == ["out"]


def test_remains_that_are_links_are_not_followed(output: Path) -> None:
    a_folder(output.parent / "theirs")
    (output.parent / "theirs" / ALIVE).touch()
    (output.parent / ".out.partial-0123abcd").symlink_to("theirs")
    (output.parent / ".out.partial-89abcdef").mkdir()
    (output.parent / ".out.partial-89abcdef" / ALIVE).symlink_to(output.parent / "theirs" / ALIVE)
    write_bundle(output)
    assert (output.parent / "theirs" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("hidden", [False, True])
def test_a_build_that_was_killed_at_its_last_step_leaves_nothing_for_long(output: Path, hidden: bool) -> None:
    draft = Draft(output)
    draft.write_text("model.onnx", "x")
    draft.write_text("manifest.json", '{"schema": 1, "files": {}}')
    shutil.copytree(draft.path, output.parent / ".out.partial-0123abcd")
    if hidden:
        (output.parent / ".out.partial-0123abcd" / ALIVE).unlink()
    draft.discard()
    write_bundle(output)
    assert names_in(output.parent) == ["out"]


def test_a_draft_in_a_draft(output: Path) -> None:
    with Draft(output) as draft:
        with Draft(draft.path / "inner" / "bundle") as inner:
            inner.write_text("model.onnx", "graph")
            inner.commit({"status": "passed"})
        bundle = draft.commit({"status": "passed", "inner": ["bundle"]})
    assert set(bundle.manifest["files"]) == {"inner/bundle/manifest.json", "inner/bundle/model.onnx"}
    load_bundle(output)


# Copies


def test_a_copy_has_what_the_manifest_lists(output: Path, tmp_path: Path) -> None:
    bundle = write_bundle(output)
    (output / "secret").write_text("x")
    copy_bundle(bundle, tmp_path / "copy")
    assert load_bundle(tmp_path / "copy").manifest == bundle.manifest
    assert not (tmp_path / "copy" / "secret").exists()


def test_a_copy_waits_for_no_pipe(output: Path, tmp_path: Path) -> None:
    bundle = write_bundle(output)
    (output / "model.onnx").unlink()
    os.mkfifo(output / "model.onnx")
    with pytest.raises(OSError, match="Not a regular file"):
        copy_bundle(bundle, tmp_path / "copy")


def test_too_little_space_is_told_in_fitting_units(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 0, 40_000_000))
    with pytest.raises(MachineError, match=r"has 40\.0 MB free; this build writes about 41\.2 MB"):
        Draft(output, bytes_needed=41_200_000)
    assert names_in(output.parent) == []
