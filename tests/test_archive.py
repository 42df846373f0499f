"""Archives: the same bytes every time, every changed byte found, and nothing in them leads outside."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dexport import archive as module
from dexport.archive import check, is_archive, pack, unpack
from dexport.bundle import MANIFEST, SCHEMA_VERSION, SIGNATURE, Bundle, Draft, load_bundle
from dexport.cli import main
from dexport.errors import DexportError, InputError, MachineError, UsageError
from tests.test_signature import write_keys

CONTENT = {"model.onnx": "graph", "model.onnx.data": "weights" * 100, "networks/decoder/model.onnx": "{}"}


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "small", CONTENT)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"))


def write_bundle(path: Path, content: dict[str, str]) -> Bundle:
    with Draft(path) as draft:
        for name, text in content.items():
            draft.write_text(name, text)
        return draft.commit({"status": "passed", "name": "small"})


def forged(files: dict[str, Any], *members: tuple[str, bytes]) -> bytes:
    """An archive as its writer would make it, were the names allowed."""
    manifest = json.dumps({"schema": SCHEMA_VERSION, "files": files}).encode()
    file = io.BytesIO()
    module._write_start(file, manifest, None)
    for name, content in members:
        file.write(module._header(name, len(content)) + content + module._padding(len(content)))
    file.write(module.END)
    return file.getvalue()


def entry(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": sha256(content).hexdigest()}


def refuse(path: Path, tmp_path: Path, match: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match):
        check(path)
    with pytest.raises(InputError, match=match):
        unpack(path, tmp_path / "unpacked")
    assert sorted(tmp_path.rglob("*")) == before


# Round trip


def test_it_gives_the_bundle_back(plain: Path, tmp_path: Path) -> None:
    packed = pack(plain, tmp_path / "x.dexport")
    assert (packed.bytes, packed.key) == (packed.path.stat().st_size, None)
    assert is_archive(packed.path)
    assert not is_archive(plain / "model.onnx")
    assert check(packed.path) == packed
    unpacked = unpack(packed.path, tmp_path / "back")
    assert unpacked == load_bundle(tmp_path / "back")
    assert unpacked.manifest == load_bundle(plain).manifest


def test_the_same_bundle_gives_the_same_bytes_wherever_it_is(
    small: Bundle, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    first = pack(small.path, tmp_path / "a.dexport", sign_key=keys[0]).path.read_bytes()
    copy = shutil.copytree(small.path, tmp_path / "copy")
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
    (copy / "model.onnx").chmod(0o755)
    assert pack(copy, tmp_path / "b.dexport", sign_key=keys[0]).path.read_bytes() == first


def test_tar_reads_it(small: Bundle, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    path = pack(small.path, tmp_path / "x.dexport", sign_key=keys[0]).path
    with tarfile.open(path) as file:
        assert file.getnames() == [MANIFEST, SIGNATURE, *sorted(CONTENT)]
        assert {(m.mtime, m.mode, m.uid, m.uname, m.isreg()) for m in file} == {(0, 0o644, 0, "", True)}
        file.extractall(tmp_path / "tar", filter="data")
    assert load_bundle(tmp_path / "tar", keys[1]).manifest == small.manifest


def test_a_signature_is_kept_replaced_and_required(small: Bundle, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    archive = tmp_path / "x.dexport"
    first = pack(small.path, archive, sign_key=keys[0])
    signed = unpack(archive, tmp_path / "signed", require_signature=keys[1]).path
    assert pack(signed, archive, force=True).key == first.key
    private, public = write_keys(tmp_path / "other")
    assert pack(signed, archive, sign_key=private, force=True).key != first.key
    check(archive, public)
    with pytest.raises(InputError, match="signed with another key"):
        check(archive, keys[1])
    with pytest.raises(InputError, match="is not signed"):
        unpack(pack(small.path, archive, force=True).path, tmp_path / "no", require_signature=public)
    assert not (tmp_path / "no").exists()


def test_long_names_and_large_sizes_have_headers(tmp_path: Path) -> None:
    name = "networks/" + "long-" * 40 + "/model.onnx"
    bundle = write_bundle(tmp_path / "long", {name: "x", "networks/décodeur/a": ""})
    unpack(pack(bundle.path, tmp_path / "x.dexport").path, tmp_path / "back")
    assert (tmp_path / "back" / name).read_text() == "x"
    large = tarfile.TarInfo.frombuf(module._header("a", 1 << 40)[1024:], "utf-8", "strict")
    assert large.name == "a"  # the size is in the extended header before it


# What was changed is found


def test_every_flipped_byte_is_found(small: Bundle, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    path = pack(small.path, tmp_path / "x.dexport", sign_key=keys[0]).path
    content = path.read_bytes()
    for position in range(len(content)):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([content[position] ^ 1 << position % 8]))
        with pytest.raises(InputError):
            check(path)
        with path.open("r+b") as file:
            file.seek(position)
            file.write(content[position : position + 1])
    check(path)


def test_every_truncation_and_any_addition_is_found(small: Bundle, tmp_path: Path) -> None:
    path = pack(small.path, tmp_path / "x.dexport").path
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            check(path)
    for more in (b"\0", bytes(512), content):
        path.write_bytes(content + more)
        refuse(path, tmp_path, "bytes, expected")


# What an attacker would try


OUTSIDE = ["../x", "/etc/x", "a/../../x", "a//b", "./x", "", ".", "a\\..\\x", "c:x", "a\nb", "a\x00b", "\ud800"]


@pytest.mark.parametrize("name", [*OUTSIDE, MANIFEST, SIGNATURE, "x" * 256, "a/" * 600 + "x"])
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    path.write_bytes(forged({name: entry(b"x")}))
    refuse(path, tmp_path, "an entry that no bundle has|is a file and a folder")


def test_a_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    path.write_bytes(forged({"a": entry(b"x"), "a/b": entry(b"x")}, ("a", b"x"), ("a/b", b"x")))
    refuse(path, tmp_path, "a is a file and a folder")


@pytest.mark.parametrize("size", [-1, True, 1.0, "1", None, 1 << 60, 10**400])
def test_sizes_that_no_file_has_are_refused(size: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    path.write_bytes(forged({"a": {"size": size, "sha256": ""}}))
    refuse(path, tmp_path, "an entry that no bundle has")


@pytest.mark.parametrize("files", [[], None, {"a": 1}, {"a": {"size": 1}}])
def test_manifests_of_another_form_are_refused(files: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    path.write_bytes(forged(files))
    refuse(path, tmp_path, "not a dexport manifest|an entry that no bundle has")


def with_tar(members: list[tarfile.TarInfo], path: Path) -> None:
    """A tar of the usual kind, in which all of that is possible."""
    manifest = json.dumps({"schema": SCHEMA_VERSION, "files": {m.name: entry(b"") for m in members}}).encode()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": module.MARK + "0" * 64}) as file:
        first = tarfile.TarInfo(MANIFEST)
        first.size = len(manifest)
        file.addfile(first, io.BytesIO(manifest))
        for member in members:
            file.addfile(member)


def kind(name: str, **fields: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize(
    "members",
    [
        [kind("model.onnx", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [kind("model.onnx", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
        [kind("model.onnx", type=tarfile.DIRTYPE)],
        [kind("model.onnx", type=tarfile.FIFOTYPE)],
        [kind("model.onnx", type=tarfile.CHRTYPE)],
        [kind("model.onnx", mode=0o4755)],
        [kind("model.onnx", mtime=1)],
        [kind("model.onnx"), kind("model.onnx")],
    ],
    ids=["symlink", "hard link", "folder", "fifo", "device", "setuid", "time", "twice"],
)
def test_members_other_than_plain_files_are_refused(members: list[tarfile.TarInfo], tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    with_tar(members, path)
    # With the right digest, the members themselves are what is wrong.
    content = path.read_bytes()
    with tarfile.open(path) as file:
        manifest = file.extractfile(MANIFEST)
        assert manifest is not None
        path.write_bytes(module._comment(manifest.read(), None) + content[1024:].rstrip(b"\0").ljust(4096, b"\0"))
    refuse(path, tmp_path, "bytes, expected|the header of model.onnx differs")


def test_a_manifest_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    with path.open("wb") as file:
        file.write(module._comment(b"", None) + module._header(MANIFEST, module.LARGEST_MANIFEST + 1))
        file.truncate(module.LARGEST_MANIFEST * 2)
    refuse(path, tmp_path, "is not an archive")


# Writing


def test_a_bundle_that_was_changed_is_not_packed(small: Bundle, tmp_path: Path) -> None:
    (small.path / "model.onnx").write_text("other")
    with pytest.raises(InputError, match="sha256 differs"):
        pack(small.path, tmp_path / "x.dexport")
    assert not list(tmp_path.glob("*.dexport"))


def test_a_file_that_changes_meanwhile_is_found(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_bundle(small.path)
    (small.path / "model.onnx").write_text("other")
    monkeypatch.setattr(module, "load_bundle", lambda _path: loaded)
    with pytest.raises(InputError, match=r"model\.onnx changed while it was packed"):
        pack(small.path, tmp_path / "x.dexport")
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_outputs_are_replaced_only_when_told_to(small: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "x.dexport"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        pack(small.path, path)
    assert path.read_text() == "mine"
    pack(small.path, path, force=True)
    with pytest.raises(UsageError, match="exists already"):
        pack(small.path, small.path, force=True)
    with pytest.raises(UsageError, match="exists already"):
        unpack(path, small.path)
    unpack(path, small.path, force=True)


def interrupt(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def stop(*_: Any) -> str:
        raise error

    monkeypatch.setattr(module, "_copy", stop)


@pytest.mark.parametrize("action", [pack, unpack])
def test_an_interruption_leaves_what_was_there(
    action: Callable[..., Any], small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(small.path, tmp_path / "x.dexport").path
    before = sorted(tmp_path.rglob("*"))
    source, output = (small.path, archive) if action is pack else (archive, small.path)
    interrupt(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        action(source, output, force=True)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    check(archive)
    load_bundle(small.path)


def test_a_full_disk_is_told(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(MachineError, match="No space left"):
        pack(small.path, tmp_path / "x.dexport")


def test_what_a_killed_one_left_is_removed(small: Bundle, tmp_path: Path) -> None:
    remains = tmp_path / ".x.dexport.partial-0123abcd"
    remains.write_text("half")
    pack(small.path, tmp_path / "x.dexport")
    assert not remains.exists()


def test_weights_are_streamed(tmp_path: Path) -> None:
    """64 MB of weights; a chunk is 1 MB."""
    with Draft(tmp_path / "large") as draft:
        with (draft.path / "model.onnx.data").open("wb") as file:
            file.truncate(64 << 20)
        draft.commit({"status": "passed"})
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom dexport.archive import pack, unpack\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = peak()\n"
        "pack('large', Path('x.dexport')); unpack('x.dexport', Path('back'))\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 10  # KiB


# The command line


def test_the_commands(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[Path, Path]) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    assert ", signed by " in run("pack", plain, "--sign", keys[0])
    archive = Path(f"{plain.name}.dexport")
    facts = json.loads(run("pack", plain, "--json", "--force"))
    assert facts == {"archive": str(archive), "bytes": archive.stat().st_size, "key": None}
    shown = run("info", archive)
    assert "hashes verified" in shown and "signature    none" in shown and "model.onnx.data" in shown
    assert json.loads(run("info", archive, "--json")) == load_bundle(plain).manifest
    for command in ("sample", "validate"):
        assert f"dexport unpack {archive}" in run(command, archive, code=DexportError.exit_code + 3)
    run("unpack", archive, "--require-signature", keys[1], code=4)
    run("unpack", archive)
    run("sample", plain.name, "--steps", "2", "--classes", "1")
    archive.write_bytes(archive.read_bytes()[:-1])
    assert "copy it again" in run("info", archive, code=4)


def test_an_archive_in_the_bundle_itself_is_refused(small: Bundle) -> None:
    with pytest.raises(UsageError, match="would lie in the bundle"):
        pack(small.path, small.path / "x.dexport")
    load_bundle(small.path)


def test_a_signature_that_cannot_be_read_leaves_no_archive(small: Bundle, tmp_path: Path) -> None:
    (small.path / SIGNATURE).write_bytes(b"{}")
    with pytest.raises(InputError, match="has a signature that cannot be read"):
        pack(small.path, tmp_path / "x.dexport")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
