"""What torch's own path exports, the short one exports to the same graph, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dexport.exporter import passes
from dexport.exporter.export import save
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import BATCH, Signature, TensorSpec
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import load_into, open_weights
from dexport.exporter.weights.source import RandomSource
from tests.exporter.tracing.test_repeats import described

Function = Callable[[Tensor], Any]


class Tokens(nn.Module):
    """A layer of sequences (B, T, C)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.flatten(2).transpose(1, 2))


class Flat(Tokens):
    """A layer of signals (B, C, T)."""

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.flatten(2))


class SelfAttention(Tokens):
    def forward(self, x: Tensor) -> Any:
        x = x.flatten(2).transpose(1, 2)
        return self.layer(x, x, x)[0]


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.flatten(1) * 3).long().clamp(0, 6))


def written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 1
    x[:, 1:3] *= 2
    return F.relu_(x)


UP = partial(nn.Upsample, scale_factor=2)
INDEX: Function = lambda x: (x[:, :2] > 0).long()  # noqa: E731
LAYERS: dict[str, list[Callable[[], nn.Module]]] = {
    "batch norm": [
        partial(nn.BatchNorm2d, 8),
        lambda: Flat(nn.BatchNorm1d(8)),
        partial(nn.BatchNorm2d, 8, affine=False),
        partial(nn.BatchNorm2d, 8, track_running_stats=False),
    ],
    "other norms": [
        partial(nn.GroupNorm, 2, 8),
        partial(nn.InstanceNorm2d, 8),
        partial(nn.InstanceNorm2d, 8, affine=True, track_running_stats=True),
        lambda: Tokens(nn.LayerNorm(8)),
        lambda: Tokens(nn.RMSNorm(8)),
        partial(nn.LocalResponseNorm, 3),
    ],
    "convolutions": [
        partial(nn.Conv2d, 8, 8, 3, padding=1),
        partial(nn.Conv2d, 8, 8, 3, padding="same", groups=4, dilation=2),
        partial(nn.Conv2d, 8, 8, 3, padding=1, padding_mode="reflect"),
        partial(nn.Conv2d, 8, 8, 3, padding=1, padding_mode="circular"),
        lambda: Flat(nn.Conv1d(8, 6, 3)),
        partial(nn.ConvTranspose2d, 8, 6, 4, 2, 1),
        lambda: Flat(nn.ConvTranspose1d(8, 6, 4, 2, 1)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3)),
    ],
    "products": [lambda: Tokens(nn.Linear(8, 3)), Lookup, lambda: Tokens(nn.Linear(8, 3, bias=False))],
    "pools": [
        partial(nn.AvgPool2d, 2),
        partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False),
        partial(nn.MaxPool2d, 3, 2, 1),
        partial(nn.AdaptiveAvgPool2d, 1),
        partial(nn.AdaptiveAvgPool2d, 2),
        partial(nn.AdaptiveMaxPool2d, 1),
        partial(nn.LPPool2d, 2, 2),
    ],
    "resizing": [
        UP,
        partial(nn.Upsample, size=(8, 8)),
        partial(UP, mode="bilinear"),
        partial(UP, mode="bilinear", align_corners=True),
        partial(UP, mode="bicubic"),
        partial(UP, mode="nearest-exact"),
    ],
    "moving": [
        partial(nn.PixelShuffle, 2),
        partial(nn.PixelUnshuffle, 2),
        partial(nn.ChannelShuffle, 2),
        partial(nn.Unfold, 2, stride=2),
        nn.Flatten,
        partial(nn.Unflatten, 1, (2, 4)),
        nn.Identity,
    ],
    "padding": [
        partial(nn.ZeroPad2d, 1),
        partial(nn.ConstantPad2d, (1, 2, 0, 1), 2.0),
        partial(nn.ReflectionPad2d, 1),
        partial(nn.ReplicationPad2d, 1),
        partial(nn.CircularPad2d, 1),
    ],
    "dropout": [nn.Dropout, lambda: Flat(nn.Dropout1d()), nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout],
    "attention": [
        lambda: SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)),
        lambda: Tokens(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        lambda: Tokens(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")),
    ],
    "activations": [
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
        *(nn.Hardtanh, nn.ReLU6, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanhshrink),
        *(nn.Softshrink, nn.Hardshrink, nn.Softmax2d, partial(nn.Threshold, 0.1, 2.0)),
        *(partial(nn.GLU, 1), partial(nn.PReLU, 8), partial(nn.GELU, "tanh"), partial(nn.SiLU, inplace=True)),
    ],
}
FUNCTIONS: dict[str, list[Function]] = {
    "attention of functions": [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(4, 4, dtype=torch.bool).tril()),
    ],
    "products of functions": [
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
        lambda x: torch.einsum("bchw->bhwc", x),
        lambda x: x @ x.mT,
        lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT),
        lambda x: torch.outer(x[:, 0, 0, 0], x[:, 0, 0, 1])[:, :1],
    ],
    "picking": [
        lambda x: x.gather(1, INDEX(x)),
        lambda x: torch.where(x > 0, x, -x),
        lambda x: x.masked_fill(x > 0, 1.5),
        lambda x: x.topk(2, 1)[0],
        lambda x: x.sort(1)[0],
        lambda x: x.argmax(1),
        lambda x: x.max(1)[0],
        lambda x: torch.zeros_like(x).scatter(1, INDEX(x), x[:, :2]),
        lambda x: F.one_hot(INDEX(x)[:, 0], 2),
        lambda x: x.select(1, 0).narrow(1, 1, 2),
    ],
    "scans and turns": [
        lambda x: x.cumsum(1),
        lambda x: x.roll((1, 2), (2, 3)),
        lambda x: x.flip(2),
        lambda x: x.tril() + x.triu(1),
    ],
    "pieces": [
        lambda x: x.split(3, 1)[0],
        lambda x: x.split([3, 5], 1)[1],
        lambda x: x.tensor_split(3, 1)[0],
        lambda x: x.chunk(3, 1)[2],
        lambda x: x.unbind(1)[1],
        lambda x: torch.stack([x, x], 1),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: x.movedim(1, 3).swapaxes(1, 2),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x[:, :1].squeeze(1),
        lambda x: x.double().type_as(x) + x.half().to(x),
        lambda x: x.mT.contiguous().view_as(x),
    ],
    "made": [
        lambda x: x[:, torch.tensor([2, 0])] * torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x.index_select(1, torch.tensor([2, 0])),
        lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0])),
        lambda x: x * torch.arange(4) + torch.linspace(0, 1, 4),
        lambda x: torch.full_like(x, 2) + torch.ones_like(x) + x.new_zeros(x.shape),
        lambda x: x * torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).sum(0),
    ],
    "reductions": [
        lambda x: x.norm(dim=1),
        lambda x: F.normalize(x, dim=1),
        lambda x: F.cosine_similarity(x, x + 1, dim=1),
        lambda x: x.log_softmax(1),
        lambda x: x.logsumexp(1),
        lambda x: x.var(1),
        lambda x: x.std((2, 3), correction=0),
        lambda x: x.mean((2, 3)),
        lambda x: (x > 0).any(1),
        lambda x: x.amax((1, 2)),
    ],
    "elementwise": [
        lambda x: x.clamp(-1, 1) + x.clamp(min=0),
        lambda x: torch.lerp(x, x + 1, 0.3) + torch.addcmul(x, x, x, value=0.5),
        lambda x: torch.div(x, 2, rounding_mode="floor") + torch.remainder(x, 3) + (1 - x),
        lambda x: x.abs().pow(0.3) + x.erf() + x.expm1() + x.abs().log1p(),
        lambda x: torch.atan2(x, x + 1) + x.abs().add(1).rsqrt(),
        lambda x: x.round() + x.trunc() + x.frac() + x.sign(),
        lambda x: x.nan_to_num() + torch.maximum(x, -x),
        written,
    ],
}
KINDS = LAYERS | FUNCTIONS
STATISTICS = 1e-4
"""Random statistics make large values of small ones; the sums are compared relative to the largest."""


class Network(nn.Module):
    """The sums of what each of them makes of one input, side by side."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for make in LAYERS.get(kind, ()))
        self.functions = FUNCTIONS.get(kind, [])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        results = [use(x) for use in (*self.layers, *self.functions)]
        sums = [result.float().flatten(1).mean(1) for result in results]
        return torch.stack(sums, 1) + t[:, None] + y[:, None]


def variant_of(kind: str) -> Variant:
    def signature(_config: Any, _latent: Any) -> Signature:
        inputs = (
            TensorSpec("x", "float32", (BATCH, 8, 4, 4)),
            TensorSpec("t", "float32", (BATCH,)),
            TensorSpec("y", "int64", (BATCH,)),
        )
        return Signature(inputs, (TensorSpec("out", "float32", (BATCH, len(KINDS[kind]))),))

    return resolve(replace(find_recipe("dico-s"), constructor=Network, config={"kind": kind}, signature=signature))


@functools.cache
def short_path(kind: str) -> ir.Model:
    variant = variant_of(kind)
    return passes.clean()(trace(variant, open_weights(None, variant.outline))).model


REWRITTEN = ("batch norm", "dropout", "moving", "pieces")
"""With views, casts and composite operators, where the paths differ. Torch's own takes three to ten seconds a kind."""


@pytest.mark.parametrize(
    "kind", [kind if kind in REWRITTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_both_paths_give_the_same_graph(kind: str) -> None:
    variant = variant_of(kind)
    full = passes.clean()(trace(variant, open_weights(None, variant.outline), every_block=True)).model
    assert described(short_path(kind)) == described(full)


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_path_gives_a_graph_that_computes_the_same(kind: str, tmp_path: Path) -> None:
    variant = variant_of(kind)
    weights = open_weights(None, variant.outline)
    save(short_path(kind).clone(), tmp_path / "model.onnx")
    feed = variant.signature.example(3, seed=1)
    (out,) = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]).run(None, feed)
    with torch.no_grad():
        expected = load_into(weights, variant.meta_module())(*map(torch.from_numpy, map(np.asarray, feed.values())))
    np.testing.assert_allclose(out, expected.numpy(), atol=STATISTICS * expected.abs().max().item(), rtol=0)


def test_random_statistics_are_those_of_a_norm() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(16)
            self.norms = nn.ModuleList([nn.InstanceNorm1d(16, track_running_stats=True)])
            self.register_buffer("moving_variance", torch.ones(1, 16, 1, 1))
            self.register_buffer("std", torch.ones(16))
            self.register_buffer("logvar", torch.ones(16))
            self.var = nn.Parameter(torch.ones(16))

    with torch.device("meta"):
        network = Own()
    for seed in range(3):
        state = load_into(RandomSource(network, seed), network).state_dict()
        for name in ("norm.running_var", "norms.0.running_var", "moving_variance", "std"):
            assert state[name].min() > 0.5 and state[name].max() < 2, name
        for name in ("norm.num_batches_tracked", "norms.0.num_batches_tracked"):
            assert state[name].dtype == torch.int64 and state[name] >= 0
        for name in ("norm.running_mean", "logvar", "var"):
            assert state[name].min() < 0
