"""Rotary positions: neighbouring pairs of features are turned by an angle that depends on the token's place."""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.graphs.layers import MAX_PERIOD


def rotary_tables(head_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head_dim / 2) float32 over the raster index: one dimension, not two."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32, device="cpu"), 1.0 / MAX_PERIOD**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BNTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of features: (B, N, T, d) -> (B, N, T, d).

    ``cos`` and ``sin`` are (..., T, d / 2), broadcast over what they lack.
    """
    even, odd = x_BNTd.unflatten(3, (-1, 2)).unbind(4)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3)
