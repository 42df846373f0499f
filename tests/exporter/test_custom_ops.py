"""Which custom ops a graph has, and what a plugin build would embed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from dexport.errors import MachineError, UsageError
from dexport.exporter import custom_ops as module
from dexport.exporter import passes
from dexport.exporter.custom_ops import custom_ops, wants_plugins
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.recipes import find_recipe
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights

RTX = EngineChoice("tensorrt-rtx", ("sm89",), "", "1.7")
TENSORRT = EngineChoice("tensorrt", ("sm90",), "", "10.13")
SETTINGS = {"hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 3, "input_size": 8}
CHANNELS = {"hidden_size": 16, "depth": [1, 0, 1, 0, 0], "num_classes": 3}


ROOT = Path(__file__).parents[2]


def build(recipe: str) -> ir.Model:
    """A small float16 graph of the recipe."""
    settings, latent = (SETTINGS, None) if recipe != "dico-s" else (CHANNELS, (8, 8))
    variant = resolve(find_recipe(recipe), settings, latent)
    built = passes.clean()(trace(variant, open_weights(None, variant.meta_module()))).model
    return ToLowPrecision("fp16", variant.recipe.islands)(built).model


@pytest.mark.parametrize(("recipe", "name"), [("diffit-256", "DexTMSA"), ("lit-s-2", "DexLinearAttention")])
def test_ops_are_counted_with_their_version(recipe: str, name: str) -> None:
    (op,) = custom_ops(build(recipe))
    assert op.name == name
    assert (op.version, op.nodes, op.ptx_sha256) == (1, 2, ())


HASHES = """
import json, sys
from tests.exporter.test_custom_ops import build
from tests.torch_operators import shared_tables
from dexport.exporter.custom_ops import custom_ops
for recipe in sys.argv[1:]:
    with shared_tables():
        model = build(recipe)
    print("hashes", json.dumps([custom_ops(model, target)[0].ptx_sha256 for target in ("sm80", "sm90", "sm90")]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra [plugins]")
@pytest.mark.parametrize(
    "recipes",
    [("lit-s-2", "dico-s"), pytest.param(("diffit-256",), marks=pytest.mark.slow)],  # its kernel takes ten seconds
)
def test_a_plugin_build_records_the_kernels_of_its_target(recipes: tuple[str, ...]) -> None:
    # For sm80, sm90 and sm90 again, from a process of its own, as other tests may have put triton into theirs.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", HASHES, *recipes]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.removeprefix("hashes ") for line in done.stdout.splitlines() if line.startswith("hashes ")]
    assert len(lines) == len(recipes)
    for sm80, sm90, again in map(json.loads, lines):
        assert sm80 and all(len(digest) == 64 for digest in (*sm80, *sm90))
        assert not set(sm80) & set(sm90)
        assert sm90 == again


@pytest.mark.parametrize(
    ("asked", "choice", "expected"),
    [
        ("auto", None, False),
        ("off", None, False),
        ("auto", RTX, False),
        ("off", RTX, False),
        ("auto", TENSORRT, True),
        ("on", TENSORRT, True),
        ("off", TENSORRT, False),
    ],
)
def test_plugins_are_for_tensorrt(asked, choice, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_module", lambda name: name == "triton")
    assert wants_plugins(asked, choice) is expected


def test_plugins_that_cannot_be_had_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_module", lambda _name: False)
    for choice, error, hint in (
        (None, UsageError, "--trt"),
        (RTX, UsageError, "--engine tensorrt"),
        (TENSORRT, MachineError, "pip install"),
    ):
        with pytest.raises(error) as caught:
            wants_plugins("on", choice)
        assert hint in caught.value.hint
    assert wants_plugins("auto", TENSORRT) is False
