"""The command line: frozen, and every way to fail ends with its message, its exit code and no bundle."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

import dexport
from dexport import drafts
from dexport.bundle import hash_files, load_bundle
from dexport.cli import main
from dexport.cli.commands.build import GROUPS
from dexport.cli.groups import network
from dexport.cli.headings import ExpertOption
from dexport.cli.parameters import by_part
from dexport.errors import UsageError
from dexport.exporter import export, recipes
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights

# A new option is a deliberate change: README, CHANGELOG, and this literal.
QUANTIZATION = [
    "--quantize text ...",
    "--calibration-images integer = 32",
    "--calibration-seed integer = 0",
    "--ternary-carrier auto|packed|int4|int8|nbits2|nbits4 = auto",
]
SAMPLING = [
    "--steps integer",
    "--cfg float",
    "--sampler text",
    "--order text",
    "--temperature float",
    "--recap text",
    "--setting text ...",
    "--seed integer = 0",
]
FROZEN = {
    "build": [
        "[recipe]",
        "--checkpoint text ...",
        "--init-from text",
        "--seed integer = 0",
        "--set text ...",
        "--image-size integer",
        "--latent text",
        "--stitch text",
        "--with-decoder/--without-decoder",
        "--guidance none|fused = none",
        "--fold-steps integer",
        "--graph text ...",
        "--opset integer = 23",
        "--no-pass text ...",
        "--precision fp32|fp16|bf16|auto = fp32",
        "--fp32",
        "--fp16",
        "--bf16",
        "--island text ...",
        *QUANTIZATION,
        "--trt/--no-trt",
        "--engine auto|tensorrt|tensorrt-rtx = auto",
        "--target text ...",
        "--plugins auto|on|off = auto",
        "--profile text = latency",
        "-o/--output path",
        "--parity/--no-parity = True",
        "--accept-loss/--no-accept-loss",
        "--force",
        "--cache/--no-cache = True",
        "--json",
        "-c/--config path",
        "--help-all",
    ],
    "quantize": [
        "BUNDLE",
        *QUANTIZATION,
        "--checkpoint text",
        "--recipe text",
        "--profile text",
        "-o/--output path required",
        "--parity/--no-parity = True",
        "--accept-loss/--no-accept-loss",
        "--force",
        "--json",
        "--require-signature path",
        "--help-all",
    ],
    "sample": [
        "BUNDLE",
        "--classes text",
        "--count integer = 1",
        "--batch integer = 8",
        *SAMPLING,
        "--provider cpu|cuda|tensorrt = cpu",
        "--decoder path",
        "--require-signature path",
        "--stitch-fraction float",
        "-o/--output path",
        "--force",
        "--json",
    ],
    "validate": [
        "BUNDLE",
        "--level op|forward|trajectory|distribution ... = ('op', 'forward', 'trajectory')",
        "--checkpoint text ...",
        "--recipe text",
        "--against text ...",
        "--classes text",
        *SAMPLING,
        "--reference path",
        "--count integer = 10",
        "--evaluator inception|efficientnet-lite0|pixels = inception",
        "--batch integer = 8",
        "--evaluator-weights path",
        "--work path",
        "--fail-under text ...",
        "--fail-over text ...",
        "--baseline path",
        "--accept-loss",
        "-o/--output path",
        "--junit path",
        "--markdown path",
        "--html path",
        "--record/--no-record = True",
        "--json",
        "--require-signature path",
        "--help-all",
    ],
    "compare": [
        "MODEL",
        "--recipe text required",
        "--checkpoint text",
        "--port text ...",
        "--seed integer = 0",
        "-o/--output path",
        "--accept-loss",
        "--json",
    ],
    "diff": [
        "BUNDLE",
        "[other]",
        "--checkpoint text",
        "--recipe text",
        "--profile text",
        "--network text",
        "--graph text",
        "--states example|trajectory = example",
        "--seed integer = 0",
        "--fix",
        "-o/--output path",
        "--require-signature path",
        "--json",
    ],
    "bench": [
        "BUNDLE",
        "--against path",
        "--recipe text",
        "--checkpoint text",
        "--port text ...",
        "--network text",
        "--graph text",
        "--batch integer ...",
        "--threads integer",
        "--rounds integer = 7",
        "--provider cpu|cuda = cpu",
        "--fail-under text ...",
        "--fail-over text ...",
        "--require-signature path",
        "--json",
    ],
    "sweep": [
        "BUNDLE",
        "-o/--output path",
        "--fractions text = 0,0.2,0.4,0.6,0.8,1",
        "--over text",
        "--reference path",
        "--count integer = 1",
        "--batch integer = 8",
        *SAMPLING,
        "--provider cpu|cuda|tensorrt = cpu",
        "--decoder path",
        "--require-signature path",
        "--json",
    ],
    "fid": [
        "A",
        "[b]",
        "--evaluator inception|efficientnet-lite0|pixels = inception",
        "--weights path",
        "--save-stats path",
        "--batch integer = 32",
        "--seed integer = 0",
        "--json",
    ],
    "report": [
        "REPORT",
        "--junit path",
        "--markdown path",
        "--html path",
        "--baseline path",
    ],
    "baseline": [],
    "baseline update": [
        "SOURCE",
        "-o/--output path required",
    ],
    "pack": [
        "BUNDLE",
        "-o/--output path",
        "--sign path",
        "--triton path",
        "--force",
        "--json",
    ],
    "unpack": [
        "ARCHIVE",
        "-o/--output path",
        "--require-signature path",
        "--force",
        "--json",
    ],
    "recipes": [
        "--json",
    ],
    "info": [
        "NAME",
        "--require-signature path",
        "--json",
    ],
    "doctor": [
        "--json",
    ],
    "cache": [],
    "cache ls": [
        "--json",
    ],
    "cache prune": [
        "--keep-gb float range = 0.0",
        "--json",
    ],
    "plugins": [],
    "plugins compile": [
        "--target text ...",
        "--dtype float16|bfloat16|float32 ... = ('float16',)",
        "-o/--output path",
        "--json",
    ],
}

# Shown by --help-all only; docs/build-options.md explains those of a build.
EXPERT = {
    "build": [
        "--init-from",
        "--seed",
        "--graph",
        "--opset",
        "--no-pass",
        "--calibration-images",
        "--calibration-seed",
        "--ternary-carrier",
        "--engine",
        "--plugins",
        "--cache",
    ],
    "quantize": ["--calibration-images", "--calibration-seed", "--ternary-carrier"],
    "validate": ["--batch", "--evaluator-weights", "--work"],
}

SETTINGS = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
TINY = ("dit-s-2", *(f"--set={name}={value}" for name, value in SETTINGS.items()), "--latent=8x8", "--profile=ci")
WEIGHTS_BYTES = 43_000
"""A little less than the weights of the tiny variant."""

State = dict[str, Tensor]


def invoke(*arguments: object) -> Result:
    """Run a command in this process. An exception that is not an exit is a failure of the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def build(output: Path, *options: object) -> Result:
    return invoke("build", *TINY, "--no-parity", "-o", output, *options)


def assert_refused(result: Result, code: int, message: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    errors = result.stderr[result.stderr.index("error: ") :]
    assert re.search(message, errors), errors


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for outputs, apart from where inputs are made."""
    path = tmp_path / "outputs"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def pristine() -> State:
    module = resolve(find_recipe("dit-s-2"), {**SETTINGS, "input_size": 8}).meta_module()
    weights = open_weights(None, module, seed=1)
    return {name: weights.read(name, torch.float32) for name in weights.shapes}


@pytest.fixture
def state(pristine: State) -> State:
    return dict(pristine)


@pytest.fixture(scope="module")
def built(pristine: State, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One successful build of a training checkpoint, with parity and JSON."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "w.pt"
    torch.save({"ema": pristine, "step": 3}, checkpoint)
    output = tmp_path_factory.mktemp("built") / "out"
    return output, invoke("build", *TINY, "-o", output, "--checkpoint", checkpoint, "--json")


# The command line itself


def describe(parameter: click.Parameter) -> str:
    facts = parameter.to_info_dict()
    if isinstance(parameter, click.Argument):
        return str(parameter.name).upper() if parameter.required else f"[{parameter.name}]"
    words = ["/".join((*facts["opts"], *facts["secondary_opts"]))]
    if not facts["is_flag"]:
        words.append("|".join(facts["type"].get("choices", ())) or facts["type"]["name"])
    elif not isinstance(facts["flag_value"], bool):
        words.append(f"-> {parameter.name}={facts['flag_value']}")
    words += ["..."] * facts["multiple"] + ["required"] * facts["required"]
    if isinstance(facts["default"], (str, int, float, tuple)) and facts["default"] is not False:
        words.append(f"= {facts['default']}")
    return " ".join(words)


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")


def test_command_line_is_frozen() -> None:
    assert {name: [describe(p) for p in command.params] for name, command in commands(main)} == FROZEN


@pytest.mark.parametrize(
    "command", [(), *(tuple(name.split()) for name in FROZEN)], ids=lambda command: " ".join(command)
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(command: tuple[str, ...], option: str) -> None:
    result = invoke(*command, option)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    expert = EXPERT.get(" ".join(command), [])
    for listed in FROZEN[" ".join(command)] if command else FROZEN:
        name = listed.split(" ", 1)[0].split("/")[0]
        shown = re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", result.stdout, flags=re.IGNORECASE)
        assert (shown is None) == (name in expert), name


@pytest.mark.parametrize("command", ["build", "quantize", "validate"])
def test_help_all_shows_every_option(command: str) -> None:
    result = invoke(command, "--help-all")
    assert result.exit_code == 0
    for listed in FROZEN[command]:
        assert listed.split(" ", 1)[0].split("/")[0].upper() in result.stdout.upper()
    assert not invoke(command, "--help").stdout.count(EXPERT[command][0])


def test_the_options_for_experts_are_frozen() -> None:
    assert {
        name: [parameter.opts[-1] for parameter in command.params if isinstance(parameter, ExpertOption)]
        for name, command in commands(main)
        if any(isinstance(parameter, ExpertOption) for parameter in command.params)
    } == EXPERT


def test_commands_are_shown_under_headings() -> None:
    shown = invoke("--help").stdout
    found = {heading: re.findall(r"^  (\w+)  ", text, flags=re.MULTILINE) for heading, text in sections(shown).items()}
    assert {heading: names for heading, names in found.items() if heading != "Options"} == {
        "Make": ["build", "quantize"],
        "Run": ["sample"],
        "Prove": ["validate", "compare", "diff", "bench", "sweep", "fid", "report", "baseline"],
        "Ship": ["pack", "unpack"],
        "Look": ["recipes", "info", "doctor", "cache", "plugins"],
    }


def test_options_of_a_build_are_shown_under_headings() -> None:
    headings = list(sections(invoke("build", "--help").stdout))
    assert headings == [*(group.title for group in GROUPS), "Other options"]


def sections(shown: str) -> dict[str, str]:
    """Headings of a help and what is below them."""
    parts = re.split(r"^(\w[\w ]*):$", shown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_help_of_build_explains_every_option() -> None:
    assert all(getattr(parameter, "help", "") for parameter in main.commands["build"].params[1:])


def test_exit_codes_are_told() -> None:
    assert "Exit codes: 0 fine, 1 a gate failed, 2 usage, 3 environment, 4 bad input." in invoke("--help").stdout


def test_version() -> None:
    assert invoke("--version").stdout.strip() == f"dexport, version {dexport.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [("nope",), ("build",), ("build", "dico-s", "--nope"), ("build", "dico-s", "--guidance", "full"), ("info",)],
)
def test_what_click_refuses_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_installed_script_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from dexport.cli import main; main()", "build", "dico-xxl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "error: no recipe named 'dico-xxl'"
    assert done.stderr.splitlines()[1].startswith("fix: did you mean dico-xl")


# What succeeds


def test_recipes_as_json_and_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: find_recipe(name) for name in ("dit-s-2", "dico-xl", "dico-h")}
    monkeypatch.setattr(recipes, "all_buildable", lambda: few)
    described = json.loads(invoke("recipes", "--json").stdout)
    assert [recipe["name"] for recipe in described] == list(few)
    table = invoke("recipes").stdout
    for recipe in described:
        assert recipe["name"] in table
        assert f"{recipe['parameters']:,}" in table


def test_info_of_a_recipe() -> None:
    described = json.loads(invoke("info", "dico-xl", "--json").stdout)
    assert (described["name"], described["parameters"]) == ("dico-xl", 701_151_368)
    text = invoke("info", "dico-xl").stdout
    for expected in ("dico-xl", "701,151,368", "x (B,4,32,32) float32", "guidance.channels 3", "DiCo-XL-3750K"):
        assert expected in text


def test_info_of_a_bundle(built: tuple[Path, Result]) -> None:
    output, _ = built
    assert json.loads(invoke("info", output, "--json").stdout) == load_bundle(output).manifest
    text = invoke("info", output).stdout
    for expected in ("hashes verified", "w.pt", "x (B,4,8,8) float32", "model.onnx.data"):
        assert expected in text


def test_doctor() -> None:
    described = json.loads(invoke("doctor", "--json").stdout)
    assert described["can"]["export"]["ok"]
    assert described["packages"]["torch"]["version"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra [plugins]")
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    # A process of its own, as other tests may have put triton into its interpreter, and one op only, as
    # tests/plugins/test_compile.py compiles them all.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = (
        "from dexport.cli import main\n"
        "from dexport.plugins import compile\n"
        "compile.PUBLISHED_SIZES = {'DexTMSA': compile.PUBLISHED_SIZES['DexTMSA'][:1]}\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "plugins", "compile", "--target", "sm80,sm120", "--json"]
    command += ["-o", str(tmp_path / "kernels")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = json.loads(result.stdout)
    assert {kernel["target"] for kernel in kernels} == {"sm80", "sm120"}
    assert all(kernel["registers"] > 0 and kernel["spill_bytes"] == 0 for kernel in kernels)
    assert len(names_in(tmp_path / "kernels")) == 2 * len(kernels)
    assert_refused(invoke("plugins", "compile", "--target", "sm999x"), 2, "sm999x")


def test_build_prints_the_manifest_and_nothing_else_as_json(built: tuple[Path, Result]) -> None:
    output, result = built
    assert result.exit_code == 0
    manifest = json.loads(result.stdout)
    assert manifest == load_bundle(output).manifest
    network = manifest["networks"]["denoiser"]
    assert (manifest["status"], network["weights"]["container"]) == ("passed", "ema")
    assert not network["weights"]["random"]
    assert names_in(output.parent) == ["out"]
    for step in network["steps"]:
        assert step["name"] in result.stderr


def test_random_weights_are_announced(folder: Path) -> None:
    result = build(folder / "out", "--seed", 9)
    assert result.exit_code == 0
    assert "RANDOM weights (seed 9)" in result.stdout
    assert "not run" in result.stdout
    assert load_bundle(folder / "out").network.manifest["weights"]["random"]
    text = invoke("info", folder / "out").stdout
    assert "RANDOM" in text
    assert "not verified" in text


def test_failed_gate_exits_with_1_and_marks_the_bundle(tmp_path: Path, folder: Path) -> None:
    recipe = tmp_path / "strict.py"
    recipe.write_text(
        "from dataclasses import replace\n"
        "from dexport.exporter.recipes.dit import variant\n"
        f"plain = variant('s', 2)\n"
        f"config = {{**plain.config, **{SETTINGS!r}}}\n"
        "RECIPE = replace(plain, name='strict', config=config, gates={'fp32': -1.0})\n"
    )
    result = invoke("build", recipe, "--latent=8x8", "--profile=ci", "-o", folder / "out", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["status"] == "failed"
    assert load_bundle(folder / "out").failed
    assert "failed" in invoke("info", folder / "out").stdout


# Requests that are refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dico-xxl",), r"no recipe named 'dico-xxl'\nfix: did you mean .*dico-xl"),
        (("absent.py",), r"recipe file absent\.py does not exist"),
        (("dit-s-2", "--set", "hiden_size=16"), r"no setting 'hiden_size'\nfix: did you mean hidden_size"),
        (("dit-s-2", "--set", "hidden_size"), r"is not NAME=VALUE\nfix: for example"),
        (("dit-s-2", "--set", "depth=one"), r"--set depth='one': expected int"),
        (("dit-s-2", "--set", "num_heads=0"), r"the constructor refuses this configuration"),
        (("dit-s-2", "--set", "hidden_size=-16"), r"the constructor refuses this configuration"),
        (("dico-s", "--set", "depth=[1,2]"), r"depth needs five block counts"),
        (("dit-s-2", "--latent", "8x16"), r"takes square inputs only"),
        (("dico-s", "--latent", "8"), r"--latent '8' is not HEIGHTxWIDTH\nfix: for example --latent 8x20"),
        (("dico-s", "--latent", "²x8"), r"is not HEIGHTxWIDTH"),
        (("dico-s", "--latent", "6x8"), r"must be positive multiples of 4"),
        (("dico-s", "--latent", "8x8", "--image-size", "64"), r"exclude each other"),
        (("dico-s", "--image-size", "100"), r"is not a positive multiple of 8"),
        (("dico-s", "--guidance", "fused", "--set", "class_dropout_prob=0"), r"guidance cannot be fused"),
        (("dico-s", "--opset", "99"), r"opset 99 is not supported"),
        (("dico-s", "--no-pass", "magic"), r"no pass 'magic' .*\nfix: choose from static-reshape, "),
        (("dico-s", "--profile", "fast"), r"there is no profile 'fast'"),
        (("dico-s", "--target", "sm89"), r"need --trt\nfix: add --trt"),
        (("dico-s", "--trt", "--target", "sm90", "--engine", "tensorrt-rtx"), r"does not target SM 9\.0"),
        (("dico-s", "--checkpoint", "absent.pt"), r"checkpoint absent\.pt does not exist\nfix: "),
    ],
)
def test_bad_request(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    assert_refused(invoke("build", *arguments, "-o", folder / "out"), 2, message)
    assert names_in(folder) == []


def test_info_of_something_unknown(tmp_path: Path) -> None:
    assert_refused(invoke("info", "dico-xxl"), 2, r"no recipe named 'dico-xxl'\nfix: did you mean")
    assert_refused(invoke("info", tmp_path), 4, r"is not a bundle: it has no manifest\.json\nfix: ")


def test_info_of_a_bundle_whose_manifest_lacks_something(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 2, "files": {}}')
    assert_refused(invoke("info", tmp_path), 4, "incomplete")


def test_info_prefers_the_recipe_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dico-s").mkdir()
    assert "33,137,672" in invoke("info", "dico-s").output
    assert_refused(invoke("info", "./dico-s"), 4, "not a bundle")


@pytest.mark.parametrize(("option", "message"), [("--fp16", "'decoder' matches no module"), ("--fp32", "needs --fp16")])
def test_islands_that_do_nothing_are_refused(folder: Path, option: str, message: str) -> None:
    assert_refused(build(folder / "out", option, "--island", "decoder"), 2, message)
    assert names_in(folder) == []


@pytest.mark.parametrize(
    "given",
    [
        ("--fp16", "--bf16"),
        ("--bf16", "--fp16", "--bf16"),
        ("--fp32", "--fp16"),
        ("--fp16", "--fp32"),
        ("--fp32", "--precision", "fp16"),
        ("--precision", "fp16", "--fp32"),
        ("--precision", "fp32", "--bf16"),
        ("--precision", "auto", "--fp16"),
        ("--fp32", "--precision", "auto"),
    ],
)
def test_precisions_that_contradict_each_other_are_refused(folder: Path, given: tuple[str, ...]) -> None:
    assert_refused(build(folder / "out", *given), 2, r"--\S+( \S+)? and --\S+( \S+)? exclude each other\nfix: ")
    assert names_in(folder) == []


@pytest.mark.parametrize(
    "given", [("--fp16",), ("--fp16", "--fp16"), ("--fp16", "--precision", "fp16"), ("--precision", "fp16")]
)
def test_the_same_precision_twice_is_no_contradiction(
    folder: Path, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def stop(*_: object, precision: str, **__: object) -> None:
        seen.append(precision)
        raise UsageError("stopped")

    monkeypatch.setattr("dexport.validate.build.build_and_validate", stop)
    assert_refused(build(folder / "out", *given), 2, "stopped")
    assert seen == ["fp16"]


def test_info_of_a_tampered_bundle(built: tuple[Path, Result], tmp_path: Path) -> None:
    copy = shutil.copytree(built[0], tmp_path / "copy")
    (copy / "model.onnx.data").write_bytes(b"other")
    assert_refused(invoke("info", copy), 4, r"model\.onnx\.data: size differs\nfix: ")


# Checkpoints that are refused


def without_a_key(state: State, path: Path) -> None:
    del state["pos_embed"]
    torch.save(state, path)


def with_another_key(state: State, path: Path) -> None:
    torch.save({"model": {**state, "head.weight": torch.zeros(1)}}, path)


def with_another_shape(state: State, path: Path) -> None:
    torch.save({**state, "final_layer.linear.bias": torch.zeros(3)}, path)


def truncated(state: State, path: Path) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])


def noise(state: State, path: Path) -> None:  # noqa: ARG001
    path.write_bytes(bytes(range(256)) * 8)


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def malicious(state: State, path: Path) -> None:
    torch.save({**state, "x": Malicious(path.with_name("ran"))}, path)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (without_a_key, "w.pt", r"missing \(1\):\s+pos_embed\nfix: .*--set"),
        (with_another_key, "w.pt", r"unexpected \(1\):\s+head\.weight\nfix: "),
        (with_another_shape, "w.pt", r"final_layer\.linear\.bias: \[3\] in the checkpoint, \[32\] in the model\nfix: "),
        (truncated, "w.safetensors", r"is not a whole safetensors file: .*\nfix: "),
        (truncated, "w.pt", r"is not a whole PyTorch checkpoint: .*\nfix: "),
        (truncated_legacy, "w.pt", r"is not a whole PyTorch checkpoint: .*\nfix: "),
        (noise, "w.safetensors", r"is not a whole safetensors file"),
        (noise, "w.pt", r"is not a .*PyTorch checkpoint"),
        (malicious, "w.pt", r"needs to run \w+\.system when it is unpickled; that was refused\nfix: "),
    ],
)
def test_bad_checkpoint(
    tmp_path: Path, folder: Path, state: State, make: Callable[[State, Path], None], name: str, message: str
) -> None:
    make(state, tmp_path / name)
    assert_refused(build(folder / "out", "--checkpoint", tmp_path / name), 4, message)
    assert names_in(folder) == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["blocks.0.mlp.fc1.weight", "blocks.0.attn.proj.weight", "final_layer.linear.bias"],
    ids=["read when saved", "read by a pass", "small enough to be inlined"],
)
def test_weights_that_are_not_finite(tmp_path: Path, folder: Path, state: State, name: str) -> None:
    state[name] = state[name].clone()
    state[name].view(-1)[3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    result = build(folder / "out", "--checkpoint", tmp_path / "w.safetensors")
    assert_refused(result, 4, rf"{re.escape(name)} has 1 NaN or infinite values out of \d+\nfix: ")
    assert names_in(folder) == []


def test_bad_checkpoint_with_force_leaves_the_previous_bundle(built: tuple[Path, Result], tmp_path: Path) -> None:
    output, _ = built
    before = hash_files(output)
    (tmp_path / "w.pt").write_bytes(b"noise")
    assert_refused(build(output, "--force", "--checkpoint", tmp_path / "w.pt"), 4, "is not a")
    assert hash_files(output) == before
    assert names_in(output.parent) == ["out"]


def test_unreachable_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent / "cache"))
    for address in ("hf://owner/name/w.pt", "owner/name"):
        result = build(folder / "out", "--checkpoint", address)
        assert_refused(result, 3, r"hf://owner/name cannot be reached: [^$]*\nfix: download the file elsewhere")
    assert names_in(folder) == []


# Outputs that are refused


def test_existing_output_without_force(built: tuple[Path, Result]) -> None:
    output, _ = built
    before = hash_files(output)
    assert_refused(build(output), 2, r"out exists already\nfix: .*--force")
    assert hash_files(output) == before
    assert names_in(output.parent) == ["out"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("validate", option) for option in ("-o", "--html", "--markdown", "--junit")),
        ("sweep", "-o"),
        ("fid", "--save-stats"),
        ("baseline update", "-o"),
    ],
)
def test_a_report_in_the_folder_of_a_bundle(built: tuple[Path, Result], command: str, option: str) -> None:
    output, _ = built
    before = hash_files(output)
    result = invoke(*command.split(), output, option, output / "reports/mine")
    assert_refused(result, 2, "would lie in the bundle")
    assert hash_files(output) == before


def test_default_output_is_the_name_of_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "dit-s-2").mkdir()
    assert_refused(invoke("build", *TINY), 2, r"outputs/dit-s-2 exists already")


def test_output_that_is_a_file(folder: Path) -> None:
    (folder / "out").write_text("precious")
    assert_refused(build(folder / "out"), 2, r"out exists already\nfix: ")
    assert_refused(
        build(folder / "out", "--force"), 2, r"is not a dexport bundle, so --force does not replace it\nfix: "
    )
    assert_refused(build(folder / "out" / "inner"), 3, r"out cannot be written: .*\nfix: ")
    assert (folder / "out").read_text() == "precious"
    assert names_in(folder) == ["out"]


def test_force_does_not_replace_a_folder_that_is_no_bundle(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("precious")
    assert_refused(build(folder / "out", "--force"), 2, r"is not a dexport bundle")
    assert names_in(folder / "out") == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_output_in_a_read_only_folder(folder: Path) -> None:
    folder.chmod(0o555)
    assert_refused(build(folder / "out"), 3, r"outputs cannot be written: Permission denied\nfix: ")
    folder.chmod(0o755)
    assert names_in(folder) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody may write to")
def test_output_where_nobody_may_write() -> None:
    assert_refused(build(Path("/proc/dexport/out")), 3, r"/proc/dexport cannot be written: .*\nfix: ")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_disk_that_refuses_the_draft(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(drafts, "LiveFolder", refuse)
    assert_refused(build(folder / "out"), 3, rf"outputs cannot be written: {os.strerror(code)}\nfix: ")
    assert names_in(folder) == []


def test_disk_with_too_little_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10, 0))
    assert_refused(build(folder / "out"), 3, r"has 0 bytes free; this build writes about .* kB\nfix: free some space")
    assert names_in(folder) == []


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_is_full_in_the_middle_of_the_weights(folder: Path) -> None:
    with files_limited_to(WEIGHTS_BYTES):
        result = build(folder / "out")
    assert_refused(result, 3, r"cannot be written: File too large\nfix: free some space or choose another output")
    assert names_in(folder) == []


# Interruptions


def test_interrupted_build_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        assert len(names_in(folder)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "trace", interrupt)
    result = build(folder / "out")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "stopped by SIGINT")
    assert names_in(folder) == []


def test_killed_build_leaves_no_bundle_and_the_next_one_cleans_up(folder: Path) -> None:
    command = [sys.executable, "-c", "from dexport.cli import main; main()", "build", *TINY, "-o", str(folder / "out")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any(folder.glob(".out.partial-*")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    (remains,) = names_in(folder)
    assert remains.startswith(".out.partial-")
    assert build(folder / "out").exit_code == 0
    assert names_in(folder) == ["out"]
    load_bundle(folder / "out")


@pytest.mark.rtx
@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt-rtx is not installed (extra [rtx])")
def test_killed_engine_builder_leaves_its_log_only(folder: Path) -> None:
    killed: list[int] = []
    done = threading.Event()

    def kill_the_worker() -> None:
        while not done.wait(0.005):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "dexport.exporter.engine.worker" in child.cmdline():
                        child.kill()
                        killed.append(child.pid)
                        return

    watcher = threading.Thread(target=kill_the_worker)
    watcher.start()
    try:
        result = build(folder / "out", "--trt", "--engine", "tensorrt-rtx", "--target", "sm89")
    finally:
        done.set()
        watcher.join()
    assert len(killed) == 1
    assert_refused(result, 3, r"the tensorrt-rtx builder died: killed by SIGKILL")
    (log,) = folder.iterdir()
    assert re.fullmatch(r"out\.engine-[0-9a-f]{8}\.log", log.name)
    assert f"log: {log}" in result.stderr
    assert "fix: out of memory is the usual cause" in result.stderr


def test_error_without_hint_prints_no_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_parse_latent", lambda _: (_ for _ in ()).throw(dexport.errors.GateError("just so")))
    result = invoke("build", "dico-s")
    assert (result.exit_code, result.stderr) == (1, "error: just so\n")


def test_a_file_with_an_equals_sign_names_no_part(tmp_path: Path) -> None:
    file = tmp_path / "lr=1" / "w.pt"
    file.parent.mkdir()
    file.touch()
    assert by_part((str(file),)) == {"": str(file)}
    assert by_part((f"{file}:Class",)) == {"": f"{file}:Class"}
    assert by_part((f"decoder={file}", f"dit-s-2={file}:Class")) == {
        "decoder": str(file),
        "dit-s-2": f"{file}:Class",
    }
    assert by_part(("decoder=absent.pt", "absent.pt")) == {"decoder": "absent.pt", "": "absent.pt"}
