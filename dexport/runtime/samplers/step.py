"""What all samplers share: a denoiser goes in, one state per step comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dexport.contract import Clock
from dexport.errors import UsageError
from dexport.runtime.draws import Draws

Denoiser = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(x (B, C, H, W), t (B,) float32) -> (B, C or 2C, H, W)``, already guided. t is in the sampler's unit."""


@dataclass(frozen=True, eq=False)
class Step:
    """One executed step.

    Attributes:
        index: how many steps were executed before.
        t: the time that the network received: original timestep, sigma or flow time.
        x: state (B, C, H, W) after the step.
        pred_xstart: the clean image (B, C, H, W) as predicted at ``t``.
    """

    index: int
    t: float
    x: np.ndarray
    pred_xstart: np.ndarray


class Sampler(Protocol):
    """A frozen dataclass of settings; the same settings, noise and denoiser give the same states."""

    @property
    def clock(self) -> Clock | None:
        """The unit of the time that the network receives; None where it is not linear, as a noise level."""
        ...

    def start(self, noise: Draws, shape: Sequence[int]) -> np.ndarray:
        """The initial state of ``shape`` (B, C, H, W): the first draw."""
        ...

    def run(self, denoiser: Denoiser, x: np.ndarray, noise: Draws) -> Iterator[Step]:
        """Go from the initial state to images, one step at a time."""
        ...

    def remaining(self, t: float) -> float:
        """How much of the trajectory is left once the network was evaluated at time ``t``, in the sampler's unit.

        A share from below 1 at the noisiest time to 0 at the last one: by it denoisers share a trajectory (T-Stitch).
        """
        ...


def sample(sampler: Sampler, denoiser: Denoiser, noise: Draws, shape: Sequence[int]) -> np.ndarray:
    """Start from noise, run every step, return the last state (B, C, H, W)."""
    return last(sampler.run(denoiser, sampler.start(noise, shape), noise))


def last(steps: Iterable[Step]) -> np.ndarray:
    """The state (B, C, H, W) after the last of ``steps``."""
    state: np.ndarray | None = None
    for step in steps:
        state = step.x
    if state is None:
        raise UsageError("no step was executed")
    return state


def batch_of(value: float, x: np.ndarray) -> np.ndarray:
    """``value`` for every row of x: (B,) float32, as the network takes its time."""
    return np.full(len(x), value, dtype=np.float32)


def steps_left(times: np.ndarray, t: float) -> float:
    """:meth:`Sampler.remaining` by steps: the share of ``times`` (S,), noisiest first, that come after ``t``.

    ``t`` is one of them but for its rounding to float32.
    """
    return 1 - (int(np.abs(times - t).argmin()) + 1) / len(times)


def epsilon(output: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The predicted noise (B, C, ...): without the variance channels where there are some."""
    channels = x.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise UsageError(
            f"the denoiser returned {output.shape[1]} channels for a state of {channels}",
            hint=f"expected {channels}, or {2 * channels} with a learned variance",
        )
    return output[:, :channels]
