"""DDIM (arXiv 2010.02502). Variance channels of the network are ignored.

Source of the conventions: ``ddim_sample`` of facebookresearch/DiT ``diffusion/`` (commit ed81ce2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dexport.contract import Clock
from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.samplers.step import Denoiser, Step, batch_of, epsilon
from dexport.runtime.schedule import Schedule


@dataclass(frozen=True)
class DDIM:
    """Every step of ``schedule``, noisiest first.

    ``eta`` 0 is deterministic and draws nothing after the start; with ``eta`` 1 the variance is the posterior's, and
    every step but the last draws once.
    """

    schedule: Schedule
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise UsageError(f"eta is {self.eta}", hint="choose 0 (deterministic) to 1 (as noisy as DDPM)")

    @property
    def clock(self) -> Clock:
        return Clock(0.0, float(self.schedule.trained_steps))

    def start(self, noise: Draws, shape: Sequence[int]) -> np.ndarray:
        return noise.normal(shape)

    def remaining(self, t: float) -> float:
        return t / self.schedule.trained_steps

    def run(self, denoiser: Denoiser, x: np.ndarray, noise: Draws) -> Iterator[Step]:
        for index, t in enumerate(reversed(range(self.schedule.steps))):
            original = float(self.schedule.timestep_map[t])
            eps = epsilon(denoiser(x, batch_of(original, x)), x)
            pred_xstart = self.schedule.predict_xstart_from_eps(x, np.full(len(x), t), eps)
            signal, remaining, sigma = self.coefficients(t)
            x = signal * pred_xstart + remaining * eps
            if sigma > 0:
                x = x + sigma * noise.normal(x.shape)
            yield Step(index, original, x, pred_xstart)

    def coefficients(self, t: int) -> tuple[float, float, float]:
        """Weights of the clean image, of the predicted noise and of fresh noise in the next state."""
        now, after = self.schedule.alphas_cumprod[t], self.schedule.alphas_cumprod_prev[t]
        sigma = self.eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
        return float(np.sqrt(after)), float(np.sqrt(1 - after - sigma**2)), float(sigma)
