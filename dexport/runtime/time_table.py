"""The times of one sampling run: all that a graph takes whose time-dependent values are tables (`--fold-steps`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dexport.errors import UsageError
from dexport.runtime.noise import Noise
from dexport.runtime.samplers import Sampler, last


@dataclass(frozen=True)
class TimeTable:
    """Times of a table.

    Attributes:
        steps: of the system's sampler.
        times: each time at which it evaluates the network, once, as a float32 in the sampler's unit.
    """

    steps: int
    times: tuple[float, ...]

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> TimeTable | None:
        """That of a manifest's ``sampling`` section; None where the graph takes any time."""
        recorded = (facts or {}).get("folded")
        return recorded and cls(recorded["steps"], tuple(recorded["times"]))

    def check(self, sampler: Sampler, steps: int, name: str) -> None:
        """Refuse a sampler of so many ``steps`` that evaluates the network ``name`` at other times."""
        if steps > len(self.times) or not set(evaluated_times(sampler)) <= set(self.times):
            raise UsageError(
                f"{name} was built for the times of {self.steps} steps (--fold-steps {self.steps}), and these settings "
                "need others",
                hint=f"--steps {self.steps}, or build it without --fold-steps",
            )


def evaluated_times(sampler: Sampler) -> tuple[float, ...]:
    """Every time at which a sampler evaluates its denoiser, once, in the order of the first evaluations."""
    times: dict[float, None] = {}

    def record(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        times[float(t[0])] = None
        return np.zeros_like(x)

    noise = Noise(0, images=[0])
    last(sampler.run(record, sampler.start(noise, (1, 1, 1, 1)), noise))
    return tuple(times)
