"""Bilinear resizing as TensorFlow 1 does it; FID depends on it to the second digit."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) float32 to (B, C, side, side).

    Pixel i of the output is read at i * size / side: the first corners coincide, not the centres, and nothing is
    smoothed when an image shrinks (``tf.image.resize_bilinear``; half-pixel centres came with TensorFlow 2).
    """
    rows, next_rows, row_share = _taps(images.shape[2], side)
    columns, next_columns, column_share = _taps(images.shape[3], side)
    left, right = images[..., columns], images[..., next_columns]
    across = left + (right - left) * column_share
    top, bottom = across[:, :, rows], across[:, :, next_rows]
    return top + (bottom - top) * row_share[:, None]


def _taps(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two source indices (side,) of every output pixel, and the second one's share."""
    position = torch.arange(side, dtype=torch.float32) * (torch.tensor(size, dtype=torch.float32) / side)
    first = position.floor().long()
    return first, (first + 1).clamp(max=size - 1), position - first
