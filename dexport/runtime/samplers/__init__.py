"""The systems' own samplers in numpy: a sampler takes a guided denoiser and yields one state per step."""

from __future__ import annotations

from collections.abc import Callable

from dexport.errors import UsageError
from dexport.runtime.samplers.ddim import DDIM
from dexport.runtime.samplers.ddpm import DDPM
from dexport.runtime.samplers.dpm_solver import DPMSolver
from dexport.runtime.samplers.edm import EDM
from dexport.runtime.samplers.flow import FlowEuler
from dexport.runtime.samplers.step import Denoiser, Sampler, Step, last, sample
from dexport.runtime.schedule import Schedule, linear_betas, sqrt_linear_betas

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "SAMPLERS",
    "WITH_VARIANCE",
    "DPMSolver",
    "Denoiser",
    "FlowEuler",
    "Sampler",
    "Step",
    "last",
    "make_sampler",
    "sample",
]

SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "ddpm": lambda steps: DDPM(Schedule.of_betas(linear_betas()).respaced(steps)),
    "ddim": lambda steps: DDIM(Schedule.of_betas(linear_betas()).respaced(steps)),
    "dpm-solver": lambda steps: DPMSolver(Schedule.of_betas(sqrt_linear_betas()), steps),
    "edm": EDM,
    "flow": FlowEuler,
}
"""By the names that recipes and the command line use, each with the schedule of the systems that sample with it."""

WITH_VARIANCE = ("ddpm", "ddim", "dpm-solver")
"""Those that take a network which predicts a variance as well, in as many channels behind the noise."""


def make_sampler(name: str, steps: int) -> Sampler:
    """A sampler with its system's own settings."""
    if name not in SAMPLERS:
        raise UsageError(f"no sampler {name!r}", hint=f"choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name](steps)
