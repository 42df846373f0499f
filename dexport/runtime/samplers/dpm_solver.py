"""DPM-Solver order 3 on the predicted clean image (arXiv 2206.00927, 2211.01095), as DiMR samples.

Singlestep "fast": a given number of evaluations is shared out over third-order steps with one or two lower ones at the
end. The grid of all evaluations is uniform in time, from t = 1 to 1/T. Conventions of qihao067/DiMR ``dpm_solver.py``
(commit fa141ae): ``predict_x0``, ``time_uniform``, ``method="fast"``, ``solver_type="dpm_solver"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dexport.contract import Clock
from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.samplers.step import Denoiser, Step, batch_of, epsilon, steps_left
from dexport.runtime.schedule import Schedule


@dataclass(frozen=True, eq=False)
class ContinuousSchedule:
    """A discrete schedule between its steps: step i of T is at t = (i + 1) / T, log alpha is linear in between."""

    schedule: Schedule

    @cached_property
    def _times(self) -> np.ndarray:
        return np.arange(1, self.schedule.steps + 1) / self.schedule.steps

    @cached_property
    def _log_alphas(self) -> np.ndarray:
        return 0.5 * np.log(self.schedule.alphas_cumprod)

    def log_alpha(self, t: float) -> float:
        return float(np.interp(t, self._times, self._log_alphas))

    def alpha(self, t: float) -> float:
        """Weight of the image in x_t."""
        return float(np.exp(self.log_alpha(t)))

    def sigma(self, t: float) -> float:
        """Weight of the noise in x_t."""
        return float(np.sqrt(-np.expm1(2 * self.log_alpha(t))))

    def lambda_(self, t: float) -> float:
        """log(alpha / sigma), half the log signal-to-noise ratio; falls with t."""
        return self.log_alpha(t) - float(np.log(self.sigma(t)))

    def inverse_lambda(self, value: float) -> float:
        """The time where lambda has this value."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2 * value)
        return float(np.interp(-log_alpha, -self._log_alphas, self._times))


@dataclass(frozen=True)
class DPMSolver:
    """``steps`` evaluations of the network, which predicts epsilon and receives t * T (fractional).

    Attributes:
        schedule: the full schedule that the network was trained with.
        end: last time, of 1; None is the schedule's first step, 1/T.
    """

    schedule: Schedule
    steps: int = 250
    end: float | None = None

    def __post_init__(self) -> None:
        first = 1 / self.schedule.steps
        if not 1 <= self.steps <= self.schedule.steps:
            raise UsageError(
                f"{self.steps} evaluations were asked for, but the schedule has {self.schedule.steps} steps",
                hint=f"choose between 1 and {self.schedule.steps}; 250 are usual",
            )
        if self.end is not None and not first <= self.end < 1:
            raise UsageError(f"end time {self.end:g}", hint=f"choose a time from {first:g} to below 1")

    def orders(self) -> list[int]:
        """Order of every step; an order is also how many evaluations the step takes, so they sum to ``steps``."""
        thirds, rest = divmod(self.steps, 3)
        if rest == 0:
            return [3] * (thirds - 1) + [2, 1]
        return [3] * thirds + [rest]

    def times(self) -> np.ndarray:
        """Uniform grid (steps + 1,) float64; a step of order k spans k of its intervals."""
        return np.linspace(1.0, self.end or 1 / self.schedule.steps, self.steps + 1)

    @property
    def clock(self) -> Clock:
        return Clock(0.0, float(self.schedule.steps))

    def start(self, noise: Draws, shape: Sequence[int]) -> np.ndarray:
        return noise.normal(shape)

    def remaining(self, t: float) -> float:
        return steps_left(self.times()[:-1] * self.schedule.steps, t)

    def run(self, denoiser: Denoiser, x: np.ndarray, noise: Draws) -> Iterator[Step]:  # noqa: ARG002 - deterministic
        continuous = ContinuousSchedule(self.schedule)

        def clean(x: np.ndarray, t: float) -> np.ndarray:
            eps = epsilon(denoiser(x, batch_of(t * self.schedule.steps, x)), x)
            return (x - continuous.sigma(t) * eps) / continuous.alpha(t)

        times = self.times().tolist()
        position = 0
        for index, order in enumerate(self.orders()):
            span = times[position : position + order + 1]
            position += order
            pred_xstart = clean(x, span[0])
            x = _advance(continuous, clean, x, pred_xstart, span)
            yield Step(index, span[0] * self.schedule.steps, x, pred_xstart)


def _advance(
    continuous: ContinuousSchedule,
    clean: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    x_0: np.ndarray,
    span: list[float],
) -> np.ndarray:
    """One exponential Runge-Kutta step from span[0] to span[-1] with the times between as its stages.

    With h the step in lambda, r the place of a stage in it and D the change of the predicted image since span[0]:
    order 1 ends at the exact solution for a constant image, the higher orders add a multiple of D of the last stage.
    """
    s, t = span[0], span[-1]
    lambda_s = continuous.lambda_(s)
    h = continuous.lambda_(t) - lambda_s

    def constant(time: float) -> np.ndarray:
        decay = np.expm1(lambda_s - continuous.lambda_(time))
        return (continuous.sigma(time) / continuous.sigma(s)) * x - continuous.alpha(time) * float(decay) * x_0

    if len(span) == 2:
        return constant(t)
    s1 = span[1]
    r1 = (continuous.lambda_(s1) - lambda_s) / h
    change_1 = clean(constant(s1), s1) - x_0
    if len(span) == 3:
        return constant(t) - 0.5 / r1 * continuous.alpha(t) * float(np.expm1(-h)) * change_1
    s2 = span[2]
    r2 = (continuous.lambda_(s2) - lambda_s) / h
    x_2 = constant(s2) + r2 / r1 * continuous.alpha(s2) * _phi_2(r2 * h) * change_1
    change_2 = clean(x_2, s2) - x_0
    return constant(t) + 1 / r2 * continuous.alpha(t) * _phi_2(h) * change_2


def _phi_2(h: float) -> float:
    return float(np.expm1(-h)) / h + 1.0
