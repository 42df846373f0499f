"""Four ternary values to a byte: the layout of TerDiT's released checkpoints, which the op and the ONNX file share."""

from __future__ import annotations

import torch
from torch import Tensor

VALUES_PER_BYTE = 4
SHIFTS = (6, 4, 2, 0)
"""Of the quarters of the rows, first to last."""


def pack(ternary: Tensor) -> Tensor:
    """Ternary values (out, in) -> uint8 (out / 4, in).

    The first quarter of the rows is in bits 7-6 of each byte, the last in bits 1-0; stored is value + 1. There is no
    layout for another number of rows: ValueError.
    """
    if ternary.shape[0] % VALUES_PER_BYTE:
        raise ValueError(f"{ternary.shape[0]} rows cannot be packed four to a byte")
    first, second, third, fourth = (ternary + 1).to(torch.uint8).chunk(VALUES_PER_BYTE)
    return first << 6 | second << 4 | third << 2 | fourth


def unpack(packed: Tensor) -> Tensor:
    """uint8 (out / 4, in) -> float32 values in {-1, 0, 1} (out, in): the inverse of :func:`pack`."""
    return torch.cat([(packed >> shift) & 3 for shift in SHIFTS]).float() - 1
