"""Tracing on fake tensors, over the configurations that users may set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from dexport.errors import InputError
from dexport.exporter import passes
from dexport.exporter.export import save
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.pytorch.module_path import inside, module_path
from dexport.exporter.recipes import find_recipe
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import load_into, open_weights
from tests.golden import assert_golden

DIT = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
DICO = {"hidden_size": 8, "depth": [1, 0, 2, 1, 1], "num_classes": 5}
CASES = {
    "DiT, patch 4, no learned sigma": ("dit-s-4", {**DIT, "learn_sigma": False, "input_size": 8}, None, ()),
    "DiT, odd head width, wide MLP": ("dit-b-2", {**DIT, "num_heads": 8, "mlp_ratio": 2.5}, (12, 12), ()),
    "DiT, one head, three channels, fused": ("dit-s-2", {**DIT, "num_heads": 1, "in_channels": 3}, (4, 4), ("guided",)),
    "DiT, no null label": ("dit-s-8", {**DIT, "class_dropout_prob": 0.0}, (16, 16), ()),
    "DiCo, empty level, non-square": ("dico-s", DICO, (8, 20), ()),
    "DiCo, wide MLP, non-square, fused": ("dico-h", {**DICO, "mlp_ratio": 3.5}, (12, 4), ("guided",)),
    "LiT, fused": ("lit-s-2", {**DIT, "num_heads": 3}, (8, 8), ("guided",)),
    "DiffiT, patch 1, constant guidance": ("diffit-512", {**DIT, "patch_size": 1, "input_size": 34}, None, ("guided",)),
    "DiffiT in image space": ("diffit-image-32", {"channels": 32, "num_blocks": [1, 1, 1]}, (16, 16), ()),
    "DiCo, one channel, no learned sigma": ("dico-xl", {**DICO, "in_channels": 1, "learn_sigma": False}, (4, 4), ()),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def variant(request: pytest.FixtureRequest) -> Variant:
    recipe, settings, latent, graphs = request.param
    return resolve(find_recipe(recipe), settings, latent, graphs)


def test_every_configuration_computes_the_same_in_onnx(variant: Variant, tmp_path) -> None:
    weights = open_weights(None, variant.meta_module(), seed=3)
    model = passes.clean()(trace(variant, weights)).model
    AttachFunctions()(model)
    save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    module = variant.wrap(load_into(weights, variant.meta_module()))
    for batch in (1, 2, 5):
        feed = variant.signature.example(batch, seed=batch)
        (out,) = session.run(["out"], feed)
        with torch.no_grad():
            expected = module(*map(torch.from_numpy, map(np.asarray, feed.values()))).numpy()
        assert out.shape == variant.signature.outputs[0].dims(batch)
        assert_golden(out, expected)


def test_tracing_reads_no_weight() -> None:
    variant = resolve(find_recipe("dit-s-2"), {**DIT, "input_size": 4})
    weights = open_weights(None, variant.meta_module())
    read: list[str] = []
    weights._read = read.append  # type: ignore[method-assign, assignment]
    model = passes.clean()(trace(variant, weights)).model
    assert read == []
    lazy = {name for name, v in model.graph.initializers.items() if isinstance(v.const_value, ir.LazyTensor)}
    assert "blocks.0.attn.qkv.weight.T" in lazy


def test_a_constant_without_values_is_an_error_that_names_it() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(4))
            self.register_buffer("table", torch.ones(4), persistent=False)

        def forward(self, x, t, y):
            return x * (self.scale * self.table).reshape(1, 4, 1, 1) + t.reshape(-1, 1, 1, 1) + y.reshape(-1, 1, 1, 1)

    recipe = replace(find_recipe("dico-s"), constructor=Broken, config={})
    variant = resolve(recipe)
    with pytest.raises(InputError, match="table"):
        trace(variant, open_weights(None, variant.meta_module()))


def test_module_paths_reach_every_node() -> None:
    variant = resolve(find_recipe("dit-s-2"), {**DIT, "input_size": 4}, graphs=["guided"])
    model = passes.clean()(trace(variant, open_weights(None, variant.meta_module()))).model
    paths = {module_path(node) for node in model.graph}
    assert {"guidance", "blocks.0.attn.qkv", "blocks.1.norm2", "final_layer.linear", "t_embedder.mlp.0"} <= paths
    assert not any(path.startswith("model") for path in paths)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("blocks.3.attn.qkv", "blocks.3", True),
        ("blocks.31.attn", "blocks.3", False),
        ("blocks.31.attn", "blocks.3*", True),
        ("t_embedder_2.mlp.0", "t_embedder_*", True),
        ("final_layer", "final_layer", True),
        ("", "final_layer", False),
    ],
)
def test_patterns_match_a_module_and_what_is_below_it(path: str, pattern: str, expected: bool) -> None:
    assert inside(path, pattern) is expected
