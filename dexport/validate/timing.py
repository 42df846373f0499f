"""Times of several things that take turns, so that what else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Clock = Callable[[], float]


@dataclass(frozen=True)
class Times:
    """Seconds of every round.

    Attributes:
        wall: by the clock.
        cpu: of all threads of this process.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.wall)

    @property
    def fastest(self) -> float:
        return min(self.wall)

    @property
    def median_cpu(self) -> float:
        return median(self.cpu)


def take_turns(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    wall: Clock = time.perf_counter,
    cpu: Clock = time.process_time,
    on_round: Callable[[int], None] = lambda _done: None,
) -> dict[str, Times]:
    """Run each once to warm up, then all of them in turn, ``rounds`` times."""
    for run in work.values():
        run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for done in range(rounds):
        on_round(done)
        for name, run in work.items():
            times[name].append(_timed(run, wall, cpu))
    return {name: Times(*zip(*seconds, strict=True)) for name, seconds in times.items()}


def _timed(run: Callable[[], object], wall: Clock, cpu: Clock) -> tuple[float, float]:
    started, cpu_started = wall(), cpu()
    run()
    return wall() - started, cpu() - cpu_started
