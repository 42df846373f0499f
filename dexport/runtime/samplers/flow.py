"""Euler's method for flow matching (arXiv 2210.02747) on straight paths (rectified flow, arXiv 2209.03003).

x_t = (1 - t) * image + t * noise; the network predicts the velocity dx/dt = noise - image. Time runs from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dexport.contract import Clock
from dexport.errors import UsageError
from dexport.limits import MOST_STEPS, shown
from dexport.runtime.draws import Draws
from dexport.runtime.samplers.step import Denoiser, Step, batch_of, steps_left


@dataclass(frozen=True)
class FlowEuler:
    """``steps`` Euler steps.

    Attributes:
        shift: above 1 spends more steps near the noise, t -> shift * t / (1 + (shift - 1) * t), as for large images
            (arXiv 2403.03206); 1 is uniform.
        time_scale: the network receives t * time_scale; 1000 where it was trained with timesteps.
    """

    steps: int = 50
    shift: float = 1.0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(
                f"{shown(self.steps)} flow-matching steps", hint=f"choose 1 to {MOST_STEPS}; 25 to 50 are usual"
            )
        if not 0 < self.shift < np.inf:
            raise UsageError(f"flow shift {self.shift:g}", hint="choose a number above 0; 1 is uniform")

    def times(self) -> np.ndarray:
        """(steps + 1,) float64 from 1 to 0."""
        uniform = np.linspace(1.0, 0.0, self.steps + 1)
        return self.shift * uniform / (1 + (self.shift - 1) * uniform)

    @property
    def clock(self) -> Clock:
        return Clock(0.0, self.time_scale)

    def start(self, noise: Draws, shape: Sequence[int]) -> np.ndarray:
        return noise.normal(shape)

    def remaining(self, t: float) -> float:
        return steps_left(self.times()[:-1] * self.time_scale, t)

    def run(self, denoiser: Denoiser, x: np.ndarray, noise: Draws) -> Iterator[Step]:  # noqa: ARG002 - deterministic
        times = self.times().tolist()
        for index, (now, after) in enumerate(pairwise(times)):
            t = now * self.time_scale
            velocity = denoiser(x, batch_of(t, x))
            pred_xstart = x - now * velocity
            x = x + (after - now) * velocity
            yield Step(index, t, x, pred_xstart)
