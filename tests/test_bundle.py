"""The artifact on disk: written whole or not at all, and never trusted without its hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dexport import bundle as module
from dexport import drafts, files
from dexport.bundle import (
    MANIFEST,
    MODEL,
    SCHEMA_VERSION,
    Draft,
    hash_files,
    load_bundle,
    writing_to,
)
from dexport.errors import InputError, MachineError, UsageError

CONTENT = {"model.onnx": "graph", "model.onnx.data": "weights" * 100, "reports/parity.json": "{}"}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript")
EXAMPLES = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_bundle(output: Path, *, force: bool = False, text: str = "graph") -> module.Bundle:
    with Draft(output, force=force) as draft:
        for name, content in {**CONTENT, "model.onnx": text}.items():
            draft.write_text(name, content)
        return draft.commit({"status": "passed"})


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def built(output: Path) -> Path:
    return write_bundle(output).path


# Writing


def test_committed_bundle_has_schema_and_hash_of_every_file(output: Path) -> None:
    bundle = write_bundle(output)
    assert bundle.path == output
    assert not bundle.failed
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest == bundle.manifest
    assert manifest["schema"] == SCHEMA_VERSION
    assert manifest["files"] == {
        name: {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in sorted(CONTENT.items())
    }
    assert load_bundle(output) == bundle
    assert names_in(output.parent) == ["out"]


def test_what_a_commit_returns_is_what_is_loaded(output: Path) -> None:
    with Draft(output) as draft:
        bundle = draft.commit({"status": "passed", "program": {"route": (), "names": ("a", "b")}})
    assert bundle.manifest["program"] == {"route": [], "names": ["a", "b"]}
    assert load_bundle(output) == bundle


def test_failed_status_is_told(output: Path) -> None:
    with Draft(output) as draft:
        assert draft.commit({"status": "failed"}).failed


def test_bundle_is_readable_by_others(output: Path) -> None:
    write_bundle(output)
    assert output.stat().st_mode & 0o777 == 0o755


def test_nothing_is_at_the_output_before_the_commit(output: Path) -> None:
    with Draft(output) as draft:
        draft.write_text(MODEL, "half")
        assert (draft.path / MODEL).read_text() == "half"
        assert draft.path.parent == output.parent
        assert not output.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_inside_a_draft_leaves_nothing(output: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Draft(output) as draft:
        draft.write_text(MODEL, "half")
        raise error
    assert names_in(output.parent) == []


def test_draft_that_is_never_committed_leaves_nothing(output: Path) -> None:
    with Draft(output) as draft:
        draft.write_text(MODEL, "half")
    assert names_in(output.parent) == []


def test_exception_with_force_leaves_the_previous_bundle(built: Path) -> None:
    before = hash_files(built)
    with pytest.raises(ValueError, match="stop"), Draft(built, force=True) as draft:
        draft.write_text(MODEL, "half")
        raise ValueError("stop")
    assert hash_files(built) == before
    assert names_in(built.parent) == ["out"]
    load_bundle(built)


def test_failing_last_rename_gives_the_previous_bundle_back(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_for_the_draft(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.partial-") and not self.name.endswith(drafts.REPLACED):
            raise OSError(errno.ENOSPC, "full")
        return rename(self, target)

    monkeypatch.setattr(files, "_renameat2", lambda: None)
    monkeypatch.setattr(Path, "rename", fail_for_the_draft)
    with pytest.raises(MachineError, match="cannot be written: No space left"):
        write_bundle(built, force=True, text="new")
    monkeypatch.undo()
    assert (load_bundle(built).path / MODEL).read_text() == "graph"
    assert names_in(built.parent) == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_bundle(tmp_path / "a" / "b" / "out")
    load_bundle(tmp_path / "a" / "b" / "out")


# An output that exists


@pytest.mark.parametrize("inside", ["x", "networks/new/deeper"])
def test_an_output_in_a_bundle_is_refused(built: Path, inside: str) -> None:
    with pytest.raises(UsageError, match=f"would lie in the bundle {built}"):
        write_bundle(built / inside)
    load_bundle(built)
    write_bundle(built, force=True)
    write_bundle(built.with_name("beside"))


def test_existing_output_is_refused_without_force(built: Path) -> None:
    before = hash_files(built)
    with pytest.raises(UsageError, match=f"{built} exists already") as caught:
        Draft(built)
    assert "--force" in caught.value.hint
    assert hash_files(built) == before
    assert names_in(built.parent) == ["out"]


def test_force_replaces_a_bundle_whole(built: Path) -> None:
    write_bundle(built, force=True, text="new")
    assert (load_bundle(built).path / MODEL).read_text() == "new"
    assert names_in(built.parent) == ["out"]


def test_force_replaces_a_tampered_bundle(built: Path) -> None:
    (built / MODEL).unlink()
    write_bundle(built, force=True, text="new")
    assert (load_bundle(built).path / MODEL).read_text() == "new"


def test_force_replaces_a_bundle_of_a_newer_schema(built: Path) -> None:
    (built / MANIFEST).write_text(json.dumps({"schema": SCHEMA_VERSION + 1, "files": {}}))
    write_bundle(built, force=True)
    load_bundle(built)


def test_force_replaces_what_a_link_points_to(built: Path) -> None:
    link = built.with_name("link")
    link.symlink_to(built)
    write_bundle(link, force=True, text="new")
    assert link.is_symlink()
    assert (load_bundle(built).path / MODEL).read_text() == "new"
    assert names_in(built.parent) == ["link", "out"]


def test_force_fills_an_empty_folder(output: Path) -> None:
    output.mkdir()
    write_bundle(output, force=True)
    load_bundle(output)


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("precious")


def a_folder_with_a_foreign_manifest(path: Path) -> None:
    a_folder(path)
    (path / MANIFEST).write_text('{"name": "a browser extension", "manifest_version": 3}')


@pytest.mark.parametrize("make", [a_file, a_folder, a_folder_with_a_foreign_manifest])
def test_force_does_not_replace_what_is_no_bundle(output: Path, make: Callable[[Path], None]) -> None:
    make(output)
    before = hash_files(output) if output.is_dir() else output.read_text()
    with pytest.raises(UsageError, match="is not a dexport bundle, so --force does not replace it") as caught:
        Draft(output, force=True)
    assert "-o" in caught.value.hint
    assert (hash_files(output) if output.is_dir() else output.read_text()) == before
    assert names_in(output.parent) == ["out"]


# Remains of killed builds


def test_drafts_of_dead_processes_are_removed(output: Path) -> None:
    code = (
        "import os, sys\n"
        "from dexport.bundle import Draft\n"
        "Draft(sys.argv[1]).write_text('model.onnx', 'half')\n"
        "draft = Draft(sys.argv[1])\n"
        "draft.write_text('model.onnx', 'half')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(output)], check=False)
    assert killed.returncode == -9
    assert len(names_in(output.parent)) == 1
    write_bundle(output)
    assert names_in(output.parent) == ["out"]


@pytest.mark.parametrize(
    "name",
    [
        ".out.partial-0123abcd",
        ".out.partial-0123",
        ".out.partial-0123abcdef",
        ".out.partial-stranger",
        ".out.partial-0123abcd-replaced",
        ".other.partial-0123abcd",
        "out.partial-0123abcd",
    ],
)
def test_everything_else_beside_the_output_is_kept(output: Path, name: str) -> None:
    kept = output.with_name(name)
    kept.mkdir()
    (kept / "thesis.tex").write_text("precious")
    write_bundle(output)
    assert (kept / "thesis.tex").read_text() == "precious"


def test_bundle_that_a_killed_build_moved_away_is_given_back(built: Path) -> None:
    moved = built.with_name(f".out.partial-0123abcd{drafts.REPLACED}")
    built.rename(moved)
    with pytest.raises(UsageError, match="exists already"):
        Draft(built)
    assert (load_bundle(built).path / MODEL).read_text() == "graph"
    assert not moved.exists()


def test_replaced_bundle_of_a_killed_build_goes_when_the_new_one_is_there(built: Path) -> None:
    shutil.copytree(built, built.with_name(f".out.partial-0123abcd{drafts.REPLACED}"))
    write_bundle(built, force=True, text="new")
    assert (load_bundle(built).path / MODEL).read_text() == "new"
    assert names_in(built.parent) == ["out"]


# Disks


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "quota exceeded"),
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
        (errno.EFBIG, "File too large"),
    ],
)
def test_disk_errors_are_errors_of_this_machine(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(MachineError, match=words) as caught, writing_to(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(caught.value)
    assert "another output with -o" in caught.value.hint


def test_other_errors_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), writing_to(tmp_path):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_disk_full_while_writing_leaves_nothing(output: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(MachineError, match="cannot be written"), Draft(output) as draft:
        monkeypatch.setattr(Path, "write_text", fail)
        draft.write_text(MODEL, "half")
    assert names_in(output.parent) == []


def test_unwritable_parent(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(drafts, "LiveFolder", fail)
    with pytest.raises(MachineError, match=f"{output.parent} cannot be written: Permission denied"):
        Draft(output)


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(MachineError, match="cannot be written"):
            Draft(output)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("length", [240, 300])
def test_name_that_is_too_long(tmp_path: Path, length: int) -> None:
    with pytest.raises(MachineError, match="File name too long"):
        Draft(tmp_path / ("n" * length))
    assert names_in(tmp_path) == []


def test_real_file_size_limit_leaves_nothing(output: Path) -> None:
    code = (
        "import resource, sys\n"
        "from dexport.bundle import Draft\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with Draft(sys.argv[1]) as draft:\n"
        "    draft.write_text('model.onnx', 'x' * 5000)\n"
        "    draft.commit({'status': 'passed'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=False)
    assert "MachineError" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert names_in(output.parent) == []


def test_too_little_space_is_refused_before_work(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 0, 10**9))
    with pytest.raises(MachineError, match=r"has 1\.0 GB free; this build writes about 1\.5 GB") as caught:
        Draft(output, bytes_needed=1_500_000_000)
    assert "free some space" in caught.value.hint
    assert names_in(output.parent) == []
    with Draft(output, bytes_needed=10**9):
        pass


# Loading


def flip_byte(folder: Path) -> None:
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[350] ^= 1
    path.write_bytes(bytes(data))


def truncate(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def append(folder: Path) -> None:
    with (folder / "model.onnx.data").open("ab") as file:
        file.write(b"x")


def remove(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def dangle(folder: Path) -> None:
    remove(folder)
    (folder / "model.onnx.data").symlink_to(folder / "gone")


def become_a_folder(folder: Path) -> None:
    remove(folder)
    (folder / "model.onnx.data").mkdir()


def add(folder: Path) -> None:
    (folder / "engines").mkdir()
    (folder / "engines" / "evil.plan").write_text("x")


def forget_in_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda files: files.pop("reports/parity.json"))


def wrong_entry(folder: Path) -> None:
    edit_manifest(folder, lambda files: files.update({"reports/parity.json": 3}))


def no_hash(folder: Path) -> None:
    edit_manifest(folder, lambda files: files["reports/parity.json"].pop("sha256"))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (flip_byte, "model.onnx.data: sha256 differs"),
        (truncate, "model.onnx.data: size differs"),
        (append, "model.onnx.data: size differs"),
        (remove, "model.onnx.data: missing"),
        (dangle, "model.onnx.data: missing"),
        (become_a_folder, "model.onnx.data: missing"),
        (add, "engines/evil.plan: not in the manifest"),
        (forget_in_manifest, "reports/parity.json: not in the manifest"),
        (wrong_entry, "reports/parity.json: size differs"),
        (no_hash, "reports/parity.json: sha256 differs"),
    ],
)
def test_tampering_is_named(built: Path, tamper: Callable[[Path], None], problem: str) -> None:
    tamper(built)
    with pytest.raises(InputError) as caught:
        load_bundle(built)
    headline, *problems = str(caught.value).splitlines()
    assert headline == f"{built} is not what was built:"
    assert [line.strip() for line in problems] == [problem]
    assert "do not run it" in caught.value.hint


@settings(EXAMPLES, max_examples=60)
@given(data=st.data())
def test_every_changed_byte_is_found(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "flipped"
    if not folder.exists():
        write_bundle(folder)
    name = data.draw(st.sampled_from(sorted(CONTENT)))
    original = (folder / name).read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(bytes(changed))
    try:
        with pytest.raises(InputError, match=f"{name}: sha256 differs"):
            load_bundle(folder)
    finally:
        (folder / name).write_bytes(original)


def test_all_problems_are_listed_at_once(built: Path) -> None:
    remove(built)
    add(built)
    (built / MODEL).write_text("other")
    with pytest.raises(InputError) as caught:
        load_bundle(built)
    assert len(str(caught.value).splitlines()) == 4


def test_unreadable_file_is_an_input_error(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "sha256_of", fail)
    with pytest.raises(InputError, match="cannot be read"):
        load_bundle(built)


def test_folder_without_manifest(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"is not a bundle: it has no manifest\.json") as caught:
            load_bundle(path)
        assert "dexport build" in caught.value.hint


def test_newer_schema_asks_for_an_upgrade(built: Path) -> None:
    (built / MANIFEST).write_text(json.dumps({"schema": SCHEMA_VERSION + 1, "files": {}}))
    with pytest.raises(
        InputError, match=f"schema {SCHEMA_VERSION + 1}; this dexport reads {SCHEMA_VERSION}$"
    ) as caught:
        load_bundle(built)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 5000 + b', "files": {}}',
        b'{"schema": "1", "files": {}}',
        b'{"schema": true, "files": {}}',
        b'{"schema": 1, "files": []}',
        b'{"schema": 1}',
        b'{"files": {}}',
        b'{"manifest_version": 3, "name": "a browser extension"}',
    ],
)
def test_broken_or_foreign_manifest(built: Path, content: bytes) -> None:
    (built / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json is not a dexport manifest") as caught:
        load_bundle(built)
    assert "again" in caught.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
NEARLY_A_MANIFEST = st.fixed_dictionaries(
    {
        "schema": st.sampled_from([SCHEMA_VERSION, 0, -1]) | JSON,
        "files": st.dictionaries(st.sampled_from(["model.onnx", "../up", "/etc/passwd", ""]) | st.text(), JSON) | JSON,
    }
)


@settings(EXAMPLES, max_examples=200)
@given(document=JSON | NEARLY_A_MANIFEST)
def test_any_json_as_manifest_is_an_input_error(tmp_path: Path, document: Any) -> None:
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    (folder / MODEL).write_text("graph")
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(InputError):
        load_bundle(folder)


@settings(EXAMPLES, max_examples=200)
@given(content=st.binary(max_size=200))
def test_any_bytes_as_manifest_are_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL).write_text("graph")
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError):
        load_bundle(tmp_path)


# What production code has to install


def test_bundle_and_runtime_work_where_torch_and_onnx_are_absent(built: Path) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HEAVY!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import dexport, dexport.bundle, dexport.runtime.session\n"
        "dexport.bundle.load_bundle(sys.argv[1])\n"
        f"loaded = [name for name in sys.modules if name.partition('.')[0] in {HEAVY!r}]\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(built)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", ["dexport", "dexport.bundle"])
def test_import_pulls_in_neither_torch_nor_onnx_nor_onnxruntime(package: str) -> None:
    code = f"import sys, {package}; print([n for n in sys.modules if n in {(*HEAVY, 'onnxruntime', 'numpy')!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
