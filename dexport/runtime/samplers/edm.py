"""The deterministic sampler of EDM (Karras et al., arXiv 2206.00364, algorithm 1): Heun's method in sigma.

Source of the conventions: ``edm_sampler`` of NVlabs/edm ``generate.py`` with S_churn 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dexport.errors import UsageError
from dexport.limits import MOST_STEPS, shown
from dexport.runtime.draws import Draws
from dexport.runtime.samplers.step import Denoiser, Step, batch_of, steps_left

FEWEST_STEPS = 2


@dataclass(frozen=True)
class EDM:
    """``steps`` Heun steps, 2 * steps - 1 evaluations; the last step, to sigma 0, is Euler's.

    The denoiser takes (x, sigma (B,)) and returns the clean image. The state is float64, as officially.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not FEWEST_STEPS <= self.steps <= MOST_STEPS:
            raise UsageError(
                f"{shown(self.steps)} EDM steps", hint=f"choose {FEWEST_STEPS} to {MOST_STEPS}; 18 to 40 are usual"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise UsageError(
                f"sigma from {self.sigma_max:g} to {self.sigma_min:g}", hint="sigma_max must exceed sigma_min, above 0"
            )

    def sigmas(self) -> np.ndarray:
        """Noise levels (steps + 1,) float64, from sigma_max to sigma_min and then 0."""
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return np.append(np.linspace(*ends, self.steps) ** self.rho, 0.0)

    @property
    def clock(self) -> None:
        return None

    def start(self, noise: Draws, shape: Sequence[int]) -> np.ndarray:
        return noise.normal(shape).astype(np.float64) * self.sigma_max

    def remaining(self, t: float) -> float:
        return steps_left(self.sigmas()[:-1], t)

    def run(self, denoiser: Denoiser, x: np.ndarray, noise: Draws) -> Iterator[Step]:  # noqa: ARG002 - deterministic
        x = x.astype(np.float64)
        sigmas = self.sigmas().tolist()
        for index, (now, after) in enumerate(pairwise(sigmas)):
            pred_xstart = denoiser(x, batch_of(now, x)).astype(np.float64)
            slope = (x - pred_xstart) / now
            euler = x + (after - now) * slope
            if after > 0:
                slope_after = (euler - denoiser(euler, batch_of(after, x))) / after
                x = x + (after - now) * (slope + slope_after) / 2
            else:
                x = euler
            yield Step(index, now, x, pred_xstart)
