"""Bundles that strangers made: what their manifests name is looked up, and their graphs read nothing from elsewhere."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

import dexport
from dexport.bundle import MANIFEST, MODEL, MODEL_DATA, SIGNATURE, hash_files, load_bundle
from dexport.cli import main
from dexport.errors import BundleWarning, InputError
from dexport.runtime.opened import OpenProgram
from dexport.signature import sign
from tests.bundles import trained_inputs
from tests.test_signature import write_keys


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """Change a manifest, and give every file the hash that it has: nothing but the content is wrong."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["files"] = hash_files(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def foreign(plain: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(plain, tmp_path / "foreign"))
    (folder / "reports").mkdir()
    return folder


COMMANDS: dict[str, tuple[str, ...]] = {
    "validate": ("validate", "BUNDLE", "--no-record"),
    "quantize": ("quantize", "BUNDLE", "-o", "OUT", "--quantize", "int8"),
    "diff": ("diff", "BUNDLE"),
    "bench": ("bench", "BUNDLE", "--rounds", "1", "--fail-under", "speedup=0.01"),
    "sample": ("sample", "BUNDLE", "-o", "OUT.png", "--steps", "2"),
    "info": ("info", "BUNDLE"),
    "sweep": ("sweep", "BUNDLE", "-o", "OUT.json"),
    "pack": ("pack", "BUNDLE", "-o", "OUT.dexport"),
    "triton": ("pack", "BUNDLE", "--triton", "OUT"),
}


def on(command: str, bundle: Path, *more: str) -> Result:
    places = {"BUNDLE": str(bundle), "OUT": str(bundle.parent / "out")}
    words = [
        word.replace("OUT", places["OUT"]) if "OUT" in word else places.get(word, word) for word in COMMANDS[command]
    ]
    return run(*words, *more)


@pytest.mark.parametrize("command", ["validate", "quantize", "diff", "bench"])
@pytest.mark.parametrize(
    "name", ["reports/notes.py", "reports/notes.py:RECIPE", "ABSOLUTE", "./reports/notes.py", "\x1b.py"]
)
def test_a_manifest_runs_no_file(foreign: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = foreign / "reports" / "notes.py"
    mark = foreign.parent / "ran"
    code.write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.chdir(foreign)
    rewrite(foreign, lambda m: m["networks"]["denoiser"]["recipe"].update(name=name.replace("ABSOLUTE", str(code))))
    result = on(command, foreign)
    assert not mark.exists()
    assert result.exit_code == 2, result.output
    assert "is installed here" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


def lead_elsewhere(folder: Path, location: str, **numbers: int) -> None:
    model = onnx.load(folder / MODEL, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location
        elif entry.key in numbers:
            entry.value = str(numbers[entry.key])
    (folder / MODEL).write_bytes(model.SerializeToString())
    rewrite(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_outside_of_the_bundle_are_refused_by_every_command(foreign: Path, command: str) -> None:
    shutil.copyfile(foreign / MODEL_DATA, foreign.parent / "secret")
    lead_elsewhere(foreign, "../secret")
    result = on(command, foreign)
    assert result.exit_code == 4, result.output
    assert "lies in ../secret" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("location", "numbers"),
    [
        ("/etc/passwd", {}),
        ("../secret", {}),
        ("reports/../../secret", {}),
        ("missing.data", {}),
        ("", {}),
        ("\x1b]0;x\x07", {}),
        (MODEL_DATA, {"offset": 1 << 40}),
        (MODEL_DATA, {"length": 1 << 40}),
    ],
)
def test_places_of_weights(foreign: Path, location: str, numbers: dict[str, int]) -> None:
    lead_elsewhere(foreign, location, **numbers)
    with pytest.raises(InputError, match="the data of") as error:
        load_bundle(foreign)
    assert str(error.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("name", [MODEL, MODEL_DATA, "reports/extra.txt"])
@pytest.mark.parametrize("inside", [True, False])
def test_links_in_a_bundle_are_refused(foreign: Path, name: str, inside: bool) -> None:
    target = foreign / "reports" / "real" if inside else foreign.parent / "real"
    place = foreign / name
    if place.exists():
        place.rename(target)
    else:
        target.write_text("x")
    place.symlink_to(target)
    rewrite(foreign)
    with pytest.raises(InputError, match="is a link"):
        load_bundle(foreign)


@pytest.mark.parametrize("command", ["validate", "diff", "bench", "sample"])
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_damaged_graphs_end_in_one_message(foreign: Path, command: str, kept: int) -> None:
    whole = (foreign / MODEL).read_bytes()
    (foreign / MODEL).write_bytes(whole[:kept] + b"\xff" * 100)
    rewrite(foreign)
    result = on(command, foreign)
    assert result.exit_code == 4, result.output
    assert result.stderr.count("error: ") == 1


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys")


@pytest.fixture
def signed(plain: Path, keys: tuple[Path, Path], tmp_path: Path) -> Path:
    path = Path(shutil.copytree(plain, tmp_path / "signed"))
    (path / SIGNATURE).write_bytes(sign((path / MANIFEST).read_bytes(), keys[0]))
    return path


def test_what_runs_is_what_was_checked(signed: Path, keys: tuple[Path, Path]) -> None:
    bundle = load_bundle(signed, keys[1])
    copy = bundle.path
    assert copy != signed
    assert bundle.source == signed
    assert copy.stat().st_mode & 0o077 == 0
    (signed / MODEL_DATA).write_bytes(b"exchanged after the check")
    entry = bundle.manifest["files"][MODEL_DATA]
    assert hashlib.sha256((copy / MODEL_DATA).read_bytes()).hexdigest() == entry["sha256"]
    network = bundle.network
    del bundle
    assert network.path.exists()
    del network
    assert not copy.exists()


def test_a_program_keeps_the_copy_no_longer_than_it_is_used(signed: Path, keys: tuple[Path, Path]) -> None:
    program = OpenProgram.open(signed, require_signature=keys[1])
    copy = program.bundle.path
    program.load()
    assert copy.exists()
    del program
    assert not copy.exists()


def test_a_session_outlives_the_copy(signed: Path, keys: tuple[Path, Path], plain: Path) -> None:
    with pytest.warns(BundleWarning):
        session, other = dexport.load(signed, require_signature=keys[1]), dexport.load(plain)
    x = trained_inputs()
    assert (session(**x)["out"] == other(**x)["out"]).all()


@pytest.mark.parametrize("name", [".manifest.json.partial", ".manifest.json.partial-0a1b2c3d", "extra", "a.onnx"])
def test_strangers_beside_a_signed_manifest(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    (signed / name).write_text("x")
    with pytest.raises(InputError, match="not in the manifest"):
        load_bundle(signed, keys[1])


@pytest.mark.parametrize("command", ["validate", "quantize", "diff", "bench"])
def test_commands_require_signatures(plain: Path, signed: Path, keys: tuple[Path, Path], command: str) -> None:
    unsigned = Path(shutil.copytree(plain, signed.parent / "unsigned"))
    result = on(command, unsigned, "--require-signature", str(keys[1]))
    assert result.exit_code == 4
    assert "is not signed" in result.stderr
    result = on(command, signed, "--require-signature", str(keys[1]))
    assert result.exit_code in (0, 1), result.output
    assert "error" not in result.stderr
