"""DexChannelAttention in plain PyTorch, as a custom operator that exporters see as one node.

Source: architectures sheet, DiCo (shallowdream204/DiCo at b596b05).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.plugins.reference import differentiable, restored, widened


def pool(x: Tensor) -> Tensor:
    """Mean over pixels: (B, C, H, W) -> (B, C) in float32 (float64 for float64)."""
    return widened(x).mean(dim=(2, 3))


def scale(x: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * sigmoid(weight pooled + bias): x (B, C, H, W), pooled (B, C) float32, weight (C, C, 1, 1), bias
    (C,)."""
    gates = torch.sigmoid(pooled @ widened(weight).flatten(1).t() + widened(bias))
    return restored(widened(x) * gates[:, :, None, None], x)


@torch.library.custom_op("dexport::channel_attention", mutates_args=())
def channel_attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * sigmoid(conv1x1(mean over pixels of x)).

    Args:
        x: (B, C, H, W).
        weight, bias: of the 1x1 convolution, (C, C, 1, 1) and (C,).

    Returns:
        (B, C, H, W) in the type of ``x``. Half precision is computed in float32.
    """
    return scale(x, pool(x), weight, bias)


@channel_attention.register_fake
def _fake(x: Tensor, _weight: Tensor, _bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


differentiable(channel_attention)
