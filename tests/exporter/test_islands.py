"""Every module of every family can be the float32 island of a float16 graph."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import dexport
from dexport.bundle import load_bundle
from dexport.exporter import passes
from dexport.exporter.export import save
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.pytorch.module_path import module_path
from dexport.exporter.recipes import find_recipe
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from dexport.runtime.programs.diffusion import GUIDED, MODEL
from tests.exporter.test_dimr import SMALL as DIMR
from tests.golden import load_golden

Case = tuple[str, dict[str, Any], tuple[int, int] | None, str]
SMALL: dict[str, Case] = {
    "DiT": ("dit-fashion-s", {"depth": 3}, None, MODEL),
    "DiT, fused": ("dit-fashion", {"depth": 2}, None, GUIDED),
    "DiCo": ("dico-fashion-s", {"depth": [0, 1, 2, 1, 0]}, None, MODEL),
    "DiffiT": ("diffit-fashion", {"depth": 3}, None, MODEL),
    "DiffiT in image space": ("diffit-image-32", {"channels": 32, "num_blocks": [2, 0, 1]}, (16, 16), MODEL),
    "LiT": ("lit-fashion", {"depth": 3}, None, MODEL),
    "TerDiT": ("terdit-fashion", {"n_layers": 3}, None, MODEL),
    "DiMR": ("dimr-xl-2r", DIMR, (8, 8), MODEL),
    "SD VAE": ("sd-vae-decoder", {"block_out_channels": [32, 32, 32, 32]}, (2, 2), MODEL),
    "ViTok v1": ("vitok-v1-s-b-1x16-decoder", load_golden("vitok-v1-image").config, (4, 4), MODEL),
    "ViTok v2": ("vitok-v2-350m-f16x16-encoder", load_golden("vitok-v2-image").config, (64, 64), MODEL),
}


@functools.cache
def traced(family: str) -> tuple[Variant, ir.Model]:
    """The graph as it is traced, for all tests; they change copies."""
    recipe, settings, latent, graph = SMALL[family]
    variant = resolve(find_recipe(recipe), settings, latent, [graph])
    return variant, trace(variant, open_weights(None, variant.outline, seed=1))


def cleaned(family: str) -> tuple[Variant, ir.Model]:
    variant, model = traced(family)
    return variant, passes.clean()(model.clone()).model


def modules_of(model: ir.Model) -> list[str]:
    paths = {module_path(node) for node in model.graph} - {""}
    parts = [path.split(".") for path in paths]
    return sorted({".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)})


def unlike(modules: list[str]) -> list[str]:
    """Without the insides of blocks that their neighbours have too: ``blocks.0.mlp`` is ``blocks.1.mlp`` again.

    Of blocks that are alike the second one is kept, which has a block before it; each block itself is kept.
    """
    alike: dict[tuple[str, frozenset[str]], list[str]] = {}
    for block in modules:
        stack, _, number = block.rpartition(".")
        inside = frozenset(module.removeprefix(block) for module in modules if module.startswith(f"{block}."))
        if number.isdigit() and inside:
            alike.setdefault((stack, inside), []).append(block)
    left_out = [block for blocks in alike.values() if len(blocks) > 1 for block in (blocks[0], *blocks[2:])]
    return [module for module in modules if not any(module.startswith(f"{block}.") for block in left_out)]


def converted(model: ir.Model, variant: Variant, *islands: str) -> ir.Model:
    own = replace(variant.recipe.islands, modules=(*variant.recipe.islands.modules, *islands))
    low = ToLowPrecision("fp16", own)(model.clone()).model
    AttachFunctions()(low)
    return low


def check_types(model: ir.Model) -> None:
    """ONNX's checker with its strict shape inference, with weights as inputs: their values decide no type."""
    for value in list(model.graph.initializers.values()):
        if isinstance(value.const_value, ir.LazyTensor):
            del model.graph.initializers[str(value.name)]
            value.const_value = None
            model.graph.inputs.append(value)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)


def outputs(model: ir.Model, feed: dict[str, np.ndarray], path: Path) -> list[np.ndarray]:
    save(model, path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("family", SMALL)
def test_every_module_can_be_an_island(family: str, every: bool, tmp_path: Path) -> None:
    """The quick suite tries every fifth one of those that are unlike; converting for each of them takes long."""
    variant, model = cleaned(family)
    modules = modules_of(model)
    for module in modules if every else unlike(modules)[::5]:
        check_types(converted(model, variant, module))
    repeated = [module for module in modules if ".1" in module]
    chosen = [repeated[len(repeated) // 2], repeated[0].split(".")[0] + "*"]
    feed = variant.signature.example(2, seed=3)
    exact = model.clone()
    AttachFunctions()(exact)
    wanted = outputs(exact, feed, tmp_path / "exact.onnx")
    for module in chosen:
        for result, expected in zip(
            outputs(converted(model, variant, module), feed, tmp_path / "island.onnx"), wanted, strict=True
        ):
            assert np.linalg.norm(result - expected) < 2e-2 * np.linalg.norm(expected), module


@pytest.mark.parametrize("family", ["DiT", "DiCo", "TerDiT"])
def test_copies_share_nothing_that_changes(family: str) -> None:
    _, model = traced(family)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph for output in node.outputs]
    for described in ("type", "shape", "metadata_props"):
        owners = Counter(id(getattr(value, described)) for value in values if getattr(value, described) is not None)
        assert max(owners.values()) == 1, described
    nodes = Counter(id(node.metadata_props) for node in model.graph)
    assert max(nodes.values()) == 1


def test_changing_a_graph_leaves_its_clone_alone() -> None:
    variant, model = cleaned("DiT")
    clone = model.clone()
    before = [output.dtype for node in clone.graph for output in node.outputs]
    ToLowPrecision("fp16", variant.recipe.islands)(model)
    assert [output.dtype for node in clone.graph for output in node.outputs] == before


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16", "islands": ("blocks.2*",)},
        {"precision": "bf16", "islands": ("blocks.1.mlp",)},
        {"precision": "auto", "islands": ("blocks.1",)},
    ],
    ids=["pattern", "module", "auto"],
)
def test_islands_and_automatic_precision_build(options: dict[str, Any], tmp_path: Path) -> None:
    dexport.build("dit-fashion-s", tmp_path / "out", settings={"depth": 3}, profile="ci", **options)
    assert load_bundle(tmp_path / "out").manifest["status"] == "passed"
