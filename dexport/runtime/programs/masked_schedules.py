"""How many places of a picture are known after each step, in which order they come, and what changes from step to step.

Source: valeoai/Halton-MaskGIT ``Sampler/`` at f61b0a1. It computes in float32, and so does this: whole numbers are cut
from these values, and float64 would cut others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

HALTON_POINTS = 10_000
"""That the official code draws; more come after them where they do not meet every place."""
QUARTER = np.float32(math.pi / 2)
UNIT = np.float32(1)


def ramp(start: float, end: float, steps: int) -> np.ndarray:
    """Evenly spaced values (steps,) float32, counted from the nearer end and rounded once, as ``torch.linspace``."""
    first, last = np.float32(start), np.float32(end)
    index, stride = np.arange(steps), np.float64((last - first) / np.float32(max(1, steps - 1)))
    return np.where(index < max(1, steps // 2), first + stride * index, last - stride * (steps - 1 - index)).astype(
        np.float32
    )


def arccos_share(x: np.ndarray) -> np.ndarray:
    """From 0 to 1, slowly first: float32 of float32."""
    return UNIT - np.arccos(x) / QUARTER


SHARES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "root": np.sqrt,
    "linear": lambda x: x,
    "square": np.square,
    "cosine": lambda x: UNIT - np.cos(np.float64(x * np.float32(math.pi) * np.float32(0.5))).astype(np.float32),
    "arccos": arccos_share,
}
"""Share of the places that are known, over the steps from 0 to 1."""


def halton_counts(steps: int, places: int) -> np.ndarray:
    """Places that are known after each step (steps,) int64, one more each at least: along arccos from 1/steps to 1."""
    done = np.arange(1, steps + 1)
    share = arccos_share((done / steps).astype(np.float32))
    return np.minimum(np.maximum(done, (share * np.float32(places)).astype(np.int64)), places)


def confidence_counts(schedule: str, steps: int, places: int) -> np.ndarray:
    """Places that are known after each step (steps,) int64, one more each at least: along a schedule from 0 to 1.

    One step alone, which the official code cannot take, knows them all.
    """
    if steps == 1:
        return np.array([places])
    share = SHARES[schedule](ramp(0.0, 1.0, steps))
    known = (share * np.float32(places)).astype(np.int64)
    return np.minimum(np.maximum(known, np.arange(1, steps + 1)), places)


def halton_order(height: int, width: int) -> np.ndarray:
    """All places (height * width,) int64, row by row, in the order in which Halton points first meet them.

    The points have base 2 along the height and base 3 along the width.
    """
    points = HALTON_POINTS
    while True:
        rows, columns = (
            np.floor(halton(base, points).astype(np.float32) * np.float32(size)).astype(np.int64)
            for base, size in ((2, height), (3, width))
        )
        _, first = np.unique(rows * width + columns, return_index=True)
        if len(first) == height * width:
            met = np.sort(first)
            return rows[met] * width + columns[met]
        points *= 4


def halton(base: int, points: int) -> np.ndarray:
    """The first points (points,) float64 of the sequence of a base, without 0: the digits of 1, 2, ... mirrored."""
    left, denominator = np.arange(1, points + 1), 1
    numerator = np.zeros_like(left)
    while left.any():
        left, digit = np.divmod(left, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator / denominator
