"""Ancestral sampling (DDPM) with the learned variance of improved diffusion.

Source: ``p_mean_variance`` and ``p_sample`` of facebookresearch/DiT ``diffusion/`` (commit ed81ce2), epsilon
prediction, ``clip_denoised=False``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dexport.contract import Clock
from dexport.runtime.draws import Draws
from dexport.runtime.samplers.step import Denoiser, Step, batch_of, epsilon
from dexport.runtime.schedule import Schedule, extract


class Posterior(NamedTuple):
    """p(x_{t-1} | x_t): mean, log_variance and the predicted clean image, each (B, C, H, W)."""

    mean: np.ndarray
    log_variance: np.ndarray
    pred_xstart: np.ndarray


def p_mean_variance(schedule: Schedule, output: np.ndarray, x: np.ndarray, t: np.ndarray) -> Posterior:
    """The distribution of the next state.

    A network without variance channels gets the "fixed large" variance, which is what the official code gives it.

    Args:
        output: what the network returned, (B, C, H, W) or (B, 2C, H, W).
        x: state (B, C, H, W).
        t: (B,) integer indices into ``schedule``.
    """
    channels = x.shape[1]
    eps = epsilon(output, x)
    if output.shape[1] > channels:
        log_variance = schedule.learned_range_log_variance(output[:, channels:], t)
    else:
        log_variance = np.broadcast_to(extract(schedule.fixed_large_log_variance, t, x), x.shape)
    pred_xstart = schedule.predict_xstart_from_eps(x, t, eps)
    return Posterior(schedule.q_posterior_mean(pred_xstart, x, t), log_variance, pred_xstart)


@dataclass(frozen=True)
class DDPM:
    """Every step of ``schedule``, noisiest first. One draw per step but the last, which adds no noise."""

    schedule: Schedule

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
            output = denoiser(x, batch_of(original, x))
            mean, log_variance, pred_xstart = p_mean_variance(self.schedule, output, x, np.full(len(x), t))
            x = mean if t == 0 else mean + np.exp(0.5 * log_variance) * noise.normal(x.shape)
            yield Step(index, original, x, pred_xstart)
