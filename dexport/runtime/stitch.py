"""T-Stitch: cheap denoisers for the noisiest part of the trajectory, the large one for the rest.

The rules work on ORIGINAL timesteps, not on step counts, where a schedule has them. Source: ``TStitch`` and
``MultiTStitch`` of NVlabs/T-Stitch (commit 264b60b), arXiv 2402.14167. For samplers with another time, the sampler says
how much of its trajectory is left (:meth:`dexport.runtime.samplers.Sampler.remaining`), which is t/1000 of a timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dexport.errors import UsageError
from dexport.runtime.samplers.step import Denoiser

SUM_TOLERANCE = 1e-6
TIMESTEPS = 1000


def choose(t: float, fractions: Sequence[float], steps: int = TIMESTEPS) -> int:
    """Which denoiser runs at original timestep t.

    Two denoisers: the first if t/steps >= 1 - fractions[0]. More: the first whose cumulative fraction is at least the
    progress 1 - t/steps, both in float32; the last one where rounding leaves none (the official code returns nothing).

    Args:
        t: of ``steps``; 1 is the unit of :meth:`~dexport.runtime.samplers.Sampler.remaining`.
        fractions: share of the trajectory of each denoiser, noisiest first.
    """
    if len(fractions) == 2:
        return 0 if t / steps >= 1 - fractions[0] else 1
    milestones = np.cumsum(np.asarray(fractions, dtype=np.float32), dtype=np.float32)
    reached = milestones >= np.float32(1 - t / steps)
    return int(np.argmax(reached)) if reached.any() else len(fractions) - 1


def of_timesteps(t: float) -> float:
    """The share of the trajectory that is left at an original timestep."""
    return t / TIMESTEPS


@dataclass(frozen=True)
class Stitch:
    """Several denoisers as one; the first row's t decides, as all rows of a batch are at the same step.

    Args:
        denoisers: guided denoisers with the same latent shape, schedule and prediction type, cheapest first.
        fractions: one per denoiser, together 1.
        remaining: the sampler's, whose time t is.
    """

    denoisers: Sequence[Denoiser]
    fractions: Sequence[float]
    remaining: Callable[[float], float] = of_timesteps

    def __post_init__(self) -> None:
        if len(self.denoisers) < 2 or len(self.denoisers) != len(self.fractions):
            raise UsageError(
                f"{len(self.denoisers)} denoisers and {len(self.fractions)} fractions cannot be stitched",
                hint="give two or more denoisers and a fraction for each",
            )
        check_fractions(self.fractions)

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return self.denoisers[choose(self.remaining(float(t[0])), self.fractions, 1)](x, t)


def halves(fraction: float) -> tuple[float, float]:
    """The shares of two denoisers, the first of which takes ``fraction``."""
    if not 0 <= fraction <= 1:
        raise UsageError(f"a share of {fraction:g}", hint="choose between 0 and 1")
    return fraction, 1 - fraction


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse fractions outside [0, 1] or that do not sum to 1."""
    if any(not 0 <= fraction <= 1 for fraction in fractions) or abs(sum(fractions) - 1) > SUM_TOLERANCE:
        raise UsageError(
            f"fractions {', '.join(f'{fraction:g}' for fraction in fractions)} do not share out the trajectory",
            hint="each is between 0 and 1, and together they are 1, such as 0.4,0.6",
        )
