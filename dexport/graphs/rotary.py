"""Rotary positions: neighbouring pairs of features are turned by an angle that depends on the token's place."""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.graphs.layers import MAX_PERIOD
from dexport.limits import check_table


def rotary_tables(head_dim: int, tokens: int, theta: float = MAX_PERIOD) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head_dim / 2) float32 over the raster index: one dimension, not two."""
    check_table(head_dim, tokens)
    positions = torch.arange(tokens, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, rotary_frequencies(head_dim, theta))
    return angles.cos(), angles.sin()


def rotary_frequencies(dim: int, theta: float = MAX_PERIOD) -> Tensor:
    """Angles per step (ceil(dim / 2),) float32, falling geometrically from 1."""
    check_table(dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return 1.0 / theta**exponents


def rotate(x_BNTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of features: (B, N, T, d) -> (B, N, T, d).

    ``cos`` and ``sin`` are (..., T, d / 2), broadcast over what they lack.
    """
    even, odd = x_BNTd.unflatten(3, (-1, 2)).unbind(4)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3)
