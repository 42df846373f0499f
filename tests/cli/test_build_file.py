"""``dexport build -c``: every option from a file, the command line first, and what is wrong by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dexport.cli import main
from dexport.cli.build_file import schema
from dexport.cli.commands.build import GROUPS
from dexport.errors import UsageError

DOCS = Path(__file__).parent.parent.parent / "docs"
EVERYTHING = """
recipe = "dit-s-2"

[weights]
checkpoint = ["w.pt", "decoder=vae.pt"]
init-from = "other.pt"
seed = 3

[network]
set = "hidden_size=16"
image_size = 64
latent = "8x8"
with-decoder = true

[graph]
guidance = "fused"
graph = "all"
fold-steps = 4
opset = 22
no_pass = ["static-reshape"]

[precision]
precision = "bf16"
island = ["blocks.0"]

[quantization]
quantize = ["none", "int8"]
calibration-images = 4
calibration-seed = 5
ternary-carrier = "int4"

[engine]
trt = true
engine = "tensorrt-rtx"
target = "sm89,sm120"
plugins = "off"
profile = "ci"

[output]
output = "out/x"
parity = false
accept-loss = true
force = true
cache = false
json = true
"""
EXPECTED = {
    "checkpoint": "w.pt",
    "checkpoints": {"decoder": "vae.pt"},
    "init_from": "other.pt",
    "seed": 3,
    "settings": {"hidden_size": 16},
    "image_size": 64,
    "latent": (8, 8),
    "with_decoder": True,
    "stitch": None,
    "guidance": "fused",
    "graphs": ("all",),
    "fold_steps": 4,
    "opset": 22,
    "no_passes": ("static-reshape",),
    "precision": "bf16",
    "islands": ("blocks.0",),
    "int8": "weight",
    "ternary": False,
    "precision_map": None,
    "budget": None,
    "calibration_images": 4,
    "calibration_seed": 5,
    "ternary_carrier": "int4",
    "trt": True,
    "engine": "tensorrt-rtx",
    "targets": ("sm89", "sm120"),
    "plugins": "off",
    "profile": "ci",
    "parity": False,
    "accept_loss": True,
    "force": True,
    "cache": False,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a build would have been given: its arguments, its recipe and its folder."""
    seen: dict[str, Any] = {}

    def stop(recipe: str, folder: Path, *, listener: object, **arguments: Any) -> None:  # noqa: ARG001
        seen.update(arguments, recipe=recipe, folder=folder)
        raise UsageError("stopped")

    monkeypatch.setattr("dexport.validate.build.build_and_validate", stop)
    return seen


def build(path: Path, text: str | bytes, *arguments: str) -> str:
    """What ``dexport build -c`` says on stderr."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = CliRunner().invoke(main, ["build", "-c", str(path), *arguments], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (UsageError.exit_code, "")
    return result.stderr


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_every_option_comes_from_the_file(start: str, tmp_path: Path, asked: dict[str, Any]) -> None:
    assert "stopped" in build(tmp_path / "b.toml", start + EVERYTHING)
    assert asked == {**EXPECTED, "recipe": "dit-s-2", "folder": Path("out/x")}


def test_the_file_of_this_test_has_every_key() -> None:
    tables = schema(GROUPS)["$defs"]
    keys = {key for name, table in tables.items() if name != "Build" for key in table["properties"]}
    written = set(re.findall(r"^([\w-]+) = ", EVERYTHING.replace("_", "-"), flags=re.MULTILINE))
    assert keys - {"stitch"} == written - {"recipe"}


def test_the_command_line_wins(tmp_path: Path, asked: dict[str, Any]) -> None:
    changes = (
        "dico-s",
        "--fp16",
        "--no-trt",
        "--checkpoint",
        "z.pt",
        "--quantize",
        "w8a8",
        "--seed",
        "0",
        "-o",
        "here",
    )
    build(tmp_path / "b.toml", EVERYTHING, *changes, "--no-accept-loss", "--parity", "--without-decoder", "--cache")
    assert {name: asked[name] for name in asked if asked[name] != {**EXPECTED, "folder": 0, "recipe": 0}[name]} == {
        "recipe": "dico-s",
        "folder": Path("here"),
        "precision": "fp16",
        "trt": False,
        "checkpoint": "z.pt",
        "checkpoints": {},
        "int8": "w8a8",
        "ternary": None,
        "seed": 0,
        "accept_loss": False,
        "parity": True,
        "with_decoder": False,
        "cache": True,
    }


def test_an_empty_file_changes_nothing(tmp_path: Path, asked: dict[str, Any]) -> None:
    build(tmp_path / "b.toml", "", "dico-s")
    from_file = dict(asked)
    CliRunner().invoke(main, ["build", "dico-s"])
    assert asked == from_file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engin]\n", r"unknown key engin; did you mean engine\?\nfix: known here: recipe, weights"),
        ("trt = true\n", r"unknown key trt.*\nfix: known here: "),
        ("[engine]\ntarge = 1\n", r"unknown key \[engine\] targe; did you mean target"),
        ("[precision]\nfp16 = true\n", r"unknown key \[precision\] fp16.*\nfix: known here: precision, island"),
        ("[graph]\nno-pass = 'a'\nno_pass = 'b'\n", r"\[graph\] no-pass is there twice"),
        ("[engine]\ntrt = 'yes'\n", r"\[engine\] trt: expected `bool`, got `str`\nfix: "),
        ("[graph]\nopset = '23'\n", r"\[graph\] opset: expected `int`, got `str`"),
        ("[graph]\nopset = true\n", r"\[graph\] opset: expected `int`, got `bool`"),
        ("[graph]\nopset = 23.5\n", r"\[graph\] opset: expected `int`"),
        ("[weights]\ncheckpoint = [1]\n", r"\[weights\] checkpoint\[0\]: expected `str`, got `int`"),
        ("[weights]\nseed = 99999999999999999999\n", r"\[weights\] seed: "),
        ("[engine]\nengine = 'rtx'\n", r"\[engine\] engine: .*'rtx'\nfix: choose from auto, tensorrt, tensorrt-rtx"),
        ("engine = 3\n", r"engine: expected a table, got `int`"),
        ("recipe = 3\n", r"recipe: expected `str`, got `int`"),
        ("a = \n", r"is not valid TOML"),
        (b"recipe = '\xff'\n", r"cannot be read: "),
    ],
)
def test_what_is_wrong_is_named(text: str | bytes, message: str, tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / "b.toml"
    assert re.match(rf"error: build file {re.escape(str(path))}:? {message}", build(path, text, "dico-s")), text
    assert not asked


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["build", "-c", str(tmp_path / "none.toml")], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (UsageError.exit_code, "")
    assert result.stderr.startswith(f"error: build file {tmp_path / 'none.toml'} cannot be read: ")


def test_the_published_schema_is_this_one() -> None:
    assert json.loads((DOCS / "build.schema.json").read_text(encoding="utf-8")) == schema(GROUPS)


def test_the_page_explains_every_option() -> None:
    page = (DOCS / "build-options.md").read_text(encoding="utf-8")
    for group in GROUPS:
        section = page.split(f"## {group.title}: `[{group.name}]`\n")[1].split("\n## ")[0]
        for option in group.declared():
            name = option.opts[-1]
            assert f"`{name}" in section or f"--no-{name[2:]}`" in section or option.hidden, name
