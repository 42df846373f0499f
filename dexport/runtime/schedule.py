"""Noise schedules of discrete-time diffusion: betas, respacing and the posterior, in float64.

Names are those of the field (Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672). An index ``t`` counts
the steps of this schedule; the network receives the ORIGINAL step ``timestep_map[t]``. Tables are float64; what is
computed with them has the dtype of the state x.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dexport.errors import UsageError
from dexport.limits import shown

TRAINED_STEPS = 1000
FEWEST_STEPS = 2


def linear_betas(steps: int = TRAINED_STEPS, start: float = 1e-4, end: float = 2e-2) -> np.ndarray:
    """Betas (steps,) that grow linearly: DiT, DiCo, DiffiT, LiT, TerDiT."""
    return np.linspace(start, end, steps, dtype=np.float64)


def sqrt_linear_betas(steps: int = TRAINED_STEPS, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Betas (steps,) whose square root grows linearly: Stable Diffusion, DiMR."""
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def cosine_betas(steps: int = TRAINED_STEPS, largest: float = 0.999) -> np.ndarray:
    """Betas (steps,) of a squared cosine: improved diffusion, MAR."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - signal((i + 1) / steps) / signal(i / steps), largest) for i in range(steps)])


def timesteps_of(original_steps: int, respacing: str) -> np.ndarray:
    """Original timesteps (steps,) int64, ascending, of a respacing as improved diffusion writes it.

    Args:
        respacing: a number of evenly spaced steps, such as ``100``; several with commas for parts of equal length; or
            ``ddimN`` for N steps from 0 on with one whole stride. Source: ``space_timesteps`` of LTH14/mar at fe470ac.

    Raises:
        UsageError: it is none, or of more steps than the schedule has, or of fewer than two.
    """
    hint = f"such as 100, or ddim50, with {FEWEST_STEPS} to {original_steps} steps"
    if not re.fullmatch(r"(ddim)?[0-9]{1,9}|[0-9]{1,9}(,[0-9]{1,9})+", respacing):
        raise UsageError(f"{shown(respacing)} is no respacing", hint=hint)
    if respacing.startswith("ddim"):
        wanted = int(respacing.removeprefix("ddim"))
        kept = next((r for i in range(1, original_steps) if len(r := range(0, original_steps, i)) == wanted), range(0))
        if len(kept) < FEWEST_STEPS:
            raise UsageError(f"no whole stride gives {wanted} of {original_steps} steps", hint=hint)
        return np.array(kept, dtype=np.int64)
    counts = [int(count) for count in respacing.split(",")]
    if len(counts) == 1:
        return space_timesteps(original_steps, counts[0])
    size, longer = divmod(original_steps, len(counts))
    found: list[np.ndarray] = []
    start = 0
    for number, count in enumerate(counts):
        part = size + (number < longer)
        if not 1 <= count <= part:
            raise UsageError(f"{count} of the {part} steps of a part cannot be kept", hint=hint)
        found.append(start + (np.zeros(1, np.int64) if count == 1 else space_timesteps(part, count)))
        start += part
    return np.concatenate(found)


def space_timesteps(original_steps: int, steps: int) -> np.ndarray:
    """Evenly spaced original timesteps (steps,) int64, ascending, from 0 to the last.

    The stride is summed up and rounded half to even, as ``space_timesteps`` of facebookresearch/DiT does: a
    multiplication rounds some steps differently.

    Raises:
        UsageError: more steps than the schedule has, or fewer than two.
    """
    if steps > original_steps:
        raise UsageError(
            f"{steps} steps were asked for, but the schedule has {original_steps}",
            hint=f"choose between {FEWEST_STEPS} and {original_steps} steps",
        )
    if steps < FEWEST_STEPS:
        raise UsageError(
            f"{steps} steps were asked for; fewer than {FEWEST_STEPS} cannot lead from noise to an image",
            hint=f"choose between {FEWEST_STEPS} and {original_steps} steps",
        )
    stride = (original_steps - 1) / (steps - 1)
    return np.rint(np.cumsum([0.0] + [stride] * (steps - 1))).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete schedule of T steps.

    Attributes:
        betas: (T,) float64, index 0 is the cleanest step.
        timestep_map: (T,) int64, the original timestep of every step.
    """

    betas: np.ndarray
    timestep_map: np.ndarray

    @classmethod
    def of_betas(cls, betas: Sequence[float] | np.ndarray) -> Schedule:
        """The schedule that a network was trained with."""
        table = np.asarray(betas, dtype=np.float64)
        if table.ndim != 1 or not ((table > 0) & (table <= 1)).all():
            raise UsageError("betas must be a list of numbers in (0, 1]")
        return cls(table, np.arange(len(table)))

    def respaced(self, steps: int) -> Schedule:
        """Keep ``steps`` evenly spaced steps; betas are recomputed so that alphas_cumprod stays.

        Source: ``SpacedDiffusion`` of facebookresearch/DiT (commit ed81ce2).
        """
        return self.keeping(space_timesteps(self.steps, steps))

    def keeping(self, timesteps: Sequence[int] | np.ndarray) -> Schedule:
        """Keep some steps, ascending; see :meth:`respaced`."""
        kept = np.asarray(timesteps)
        alphas_cumprod = self.alphas_cumprod[kept]
        return Schedule(1.0 - alphas_cumprod / _previous(alphas_cumprod), self.timestep_map[kept])

    @property
    def steps(self) -> int:
        return len(self.betas)

    @property
    def trained_steps(self) -> int:
        """Steps of the schedule that the network was trained with, whichever are kept: the last one always is."""
        return int(self.timestep_map[-1]) + 1

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """alphas_cumprod of the step before; 1 before the first."""
        return _previous(self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log(posterior_variance), where the first step takes the value of the second instead of -inf."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def fixed_large_log_variance(self) -> np.ndarray:
        """log(betas), where the first step takes the posterior variance of the second: no learned variance."""
        return np.log(np.append(self.posterior_variance[1], self.betas[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x_0 in the posterior mean."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in the posterior mean."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    def q_sample(self, x_start: np.ndarray, t: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """x_t of clean images: x_start and noise (B, ...), t (B,) indices."""
        signal = extract(np.sqrt(self.alphas_cumprod), t, x_start)
        return signal * x_start + extract(np.sqrt(1.0 - self.alphas_cumprod), t, x_start) * noise

    def predict_xstart_from_eps(self, x: np.ndarray, t: np.ndarray, eps: np.ndarray) -> np.ndarray:
        """x_0 (B, ...) from x_t and the predicted noise."""
        scale = extract(np.sqrt(1.0 / self.alphas_cumprod), t, x)
        return scale * x - extract(np.sqrt(1.0 / self.alphas_cumprod - 1.0), t, x) * eps

    def q_posterior_mean(self, x_start: np.ndarray, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Mean (B, ...) of q(x_{t-1} | x_t, x_0)."""
        return extract(self.posterior_mean_coef1, t, x) * x_start + extract(self.posterior_mean_coef2, t, x) * x

    def learned_range_log_variance(self, values: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Log variance from the network's second half (B, C, ...), where -1 means the posterior's and 1 means beta."""
        low = extract(self.posterior_log_variance_clipped, t, values)
        high = extract(np.log(self.betas), t, values)
        fraction = (values + 1) / 2
        return fraction * high + (1 - fraction) * low


def extract(table: np.ndarray, t: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``table[t]`` for t (B,), in the dtype of ``like`` (B, ...) and broadcastable to it."""
    return table[t].astype(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _previous(alphas_cumprod: np.ndarray) -> np.ndarray:
    return np.append(1.0, alphas_cumprod[:-1])
