"""Blocks that are traced once give the graph that tracing each of them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from dexport.exporter import passes
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import BATCH, Signature, TensorSpec
from dexport.exporter.tracing import trace as tracing
from dexport.exporter.tracing.repeats import repeated_blocks
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from tests.graphs.test_dimr import CONVNEXT, TRANSFORMER

DIT = {"hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
SMALL_IMAGE = {"channels": 32, "channel_mult": [1, 2], "num_blocks": [2, 1], "num_heads": 2, "window": 4}
FAMILIES = {
    "DiT, fused": ("dit-s-2", {**DIT, "input_size": 4}, None, ("guided",)),
    "DiCo": ("dico-s", {"hidden_size": 8, "depth": [2, 0, 2, 0, 0], "num_classes": 5}, (4, 8), ()),
    "LiT, fused": ("lit-s-2", {**DIT, "num_heads": 3}, (4, 4), ("guided",)),
    "DiffiT": ("diffit-256", {**DIT, "depth": 2, "input_size": 4}, None, ()),
    "DiffiT in image space": ("diffit-image-32", SMALL_IMAGE, (8, 8), ()),
    "TerDiT": ("terdit-600m", {"dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 8, "input_size": 4}, None, ()),
    "SD VAE": ("sd-vae-decoder", {"block_out_channels": [32, 32]}, (2, 2), ()),
    "DiMR": ("dimr-xl-2r", {"stage_configs": [TRANSFORMER, CONVNEXT], "num_classes": 4}, (8, 8), ()),
    "DiMR, layer norms": (
        "dimr-xl-2r",
        {"stage_configs": [TRANSFORMER, CONVNEXT], "num_classes": 4, "norm_type": "LN"},
        (8, 8),
        ("model", "all"),
    ),
}


SLOW = ("DiT, fused", "LiT, fused", "DiffiT in image space", "TerDiT", "DiMR, layer norms", "SD VAE")
"""Seven seconds each: guidance is around DiT; LiT and TerDiT are DiTs, with an op as DiffiT has one; DiCo and DiMR have
stages as well."""


def described(model: ir.Model) -> dict[str, Any]:
    """Everything that makes two graphs the same: nodes in order, values, shapes, types, weights in order."""

    def values(sequence: Any) -> list[Any]:
        return [v and (v.name, str(v.shape), v.dtype) for v in sequence]

    return {
        "nodes": [
            (
                node.domain,
                node.op_type,
                node.name,
                dict(node.metadata_props),
                values(node.inputs),
                values(node.outputs),
                sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()),
            )
            for node in model.graph
        ],
        "weights": [
            (name, str(value.shape), value.dtype, type(value.const_value).__name__, value.const_value.name)
            for name, value in model.graph.initializers.items()
        ],
        "outputs": values(model.graph.outputs),
        "opsets": dict(model.opset_imports),
    }


def both_ways(variant: Variant, precision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    weights = open_weights(None, variant.meta_module())
    found = []
    for every_block in (False, True):
        model = passes.clean()(trace(variant, weights, every_block=every_block)).model
        if precision is not None:
            ToLowPrecision(precision, variant.recipe.islands)(model)
        found.append(described(model))
    return found[0], found[1]


def count_full_traces(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one whenever a network is given up on and traced block by block."""
    given_up: list[None] = []
    original = tracing._repeats_once

    def counting(*arguments: Any) -> Any:
        model = original(*arguments)
        if model is None:
            given_up.append(None)
        return model

    monkeypatch.setattr(tracing, "_repeats_once", counting)
    return given_up


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow) if family in SLOW else family for family in FAMILIES]
)
def test_every_family_gets_the_graph_of_a_full_trace(
    family: str, monkeypatch: pytest.MonkeyPatch, traced_again: list[None]
) -> None:
    recipe, settings, latent, graphs = FAMILIES[family]
    variant = resolve(find_recipe(recipe), settings, latent, graphs)
    given_up = count_full_traces(monkeypatch)
    once, every = both_ways(variant, "fp16")
    assert once == every
    assert given_up == []
    assert len(traced_again) == 1  # by the full trace only
    assert repeated_blocks(variant.meta_module())


class Block(nn.Module):
    """Changed by the subclasses below in the ways that matter."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.linear(x)


class Remembering(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.gain += 1
        return super().forward(x)


class Pair(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).transpose(0, 1), x.sum(dim=1, keepdim=True)


class Deaf(Block):
    def forward(self, x: Tensor, _t: Tensor) -> Tensor:
        return super().forward(x)


class Network(nn.Module):
    """Four blocks and a way of calling them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        block = {"in place": InPlace, "remembering": Remembering, "pair": Pair, "deaf": Deaf}.get(kind, Block)
        self.kind = kind
        self.blocks = nn.ModuleList(block() for _ in range(4))
        if kind == "different gain":
            self.blocks[2].gain = 3.0
        if kind == "tied":
            self.blocks[3].linear.weight = self.blocks[1].linear.weight
        if kind == "hook":
            self.blocks[1].register_forward_hook(lambda _module, _args, out: out + 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a, b, c, d = self.blocks
        match self.kind:
            case "skips":
                first = a(x)
                second = b(first)
                x = d(c(second) + first) + second
            case "twice":
                x = b(a(b(a(x))))
            case "other sizes":
                x = b(a(x)) + d(c(x[:, :1])).sum(dim=1, keepdim=True)
            case "pair":
                for block in self.blocks:
                    y_first, y_second = block(x)
                    x = y_first.transpose(0, 1) + y_second
            case "deaf":
                x = d(c(b(a(x, t), t), t), t)
            case "in place":
                x = d(c(b(a(x)))) + x
            case _:
                x = d(c(b(a(x))))
        return x + t.reshape(-1, 1, 1) + y.reshape(-1, 1, 1)


KINDS = {
    # kind -> whether the network has to be traced in full
    "chain": False,
    "skips": False,
    "other sizes": False,
    "different gain": False,
    "hook": False,
    "tied": False,
    "pair": False,
    "deaf": False,
    "twice": True,
    "in place": True,
    "remembering": False,  # torch.export undoes what a forward sets
}


def variant_of(constructor: Callable[..., nn.Module], **config: Any) -> Variant:
    def signature(_config: Any, _latent: Any) -> Signature:
        inputs = (
            TensorSpec("x", "float32", (BATCH, 3, 4)),
            TensorSpec("t", "float32", (BATCH,)),
            TensorSpec("y", "int64", (BATCH,)),
        )
        return Signature(inputs, (TensorSpec("out", "float32", (BATCH, 3, 4)),))

    return resolve(replace(find_recipe("dico-s"), constructor=constructor, config=config, signature=signature))


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_calling_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = count_full_traces(monkeypatch)
    once, every = both_ways(variant_of(Network, kind=kind))
    assert once == every
    assert bool(given_up) is KINDS[kind]


def test_what_differs_is_not_a_repeat() -> None:
    assert set(repeated_blocks(Network("chain"))) == {f"blocks.{n}" for n in range(4)}
    assert set(repeated_blocks(Network("different gain"))) == {"blocks.0", "blocks.1", "blocks.3"}
    assert set(repeated_blocks(Network("tied"))) == {"blocks.0", "blocks.2"}
    assert set(repeated_blocks(Network("hook"))) == {"blocks.0", "blocks.2", "blocks.3"}
    with torch.device("meta"):
        deep = resolve(find_recipe("dit-s-2"), DIT).module()
    assert set(repeated_blocks(deep)) == {"blocks.0", "blocks.1", "blocks.2"}
