"""The draws of MAR's goldens in the order of the program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dexport.runtime.programs.masked_diffusion import MaskedDiffusion
from tests.golden import Golden


def official_draws(golden: Golden, program: MaskedDiffusion) -> list[np.ndarray]:
    """The permutation, and of each step the noise of its tokens, which the goldens hold for all tokens."""
    orders, noise = golden.inputs["orders"].numpy(), golden.inputs["noise"].numpy()
    draws, left, call = [orders], orders.shape[1], 0
    for group in program.plan(orders.shape[1]):
        positions = np.sort(orders[:, left - sum(turn.count for turn in group) : left], axis=1)
        left, start = left - positions.shape[1], 0
        for number, turn in enumerate(group):
            inner = program.light_inner if number else program.inner
            places = positions[:, start : start + turn.count]
            draws.append(_of_places(noise[call, : inner.steps], places))
            start, call = start + turn.count, call + 1
    return draws


def _of_places(noise: np.ndarray, places: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(steps, B, L, C) -> (B, steps, count, C)."""
    return np.stack([noise[:, row, own] for row, own in enumerate(places)])
