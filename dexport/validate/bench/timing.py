"""Times of several things that take turns, so that what else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

Clock = Callable[[], float]
CONFIDENCE = 0.95
FEW = 6
"""Rounds below which no interval of the median reaches that confidence, not even from the smallest to the largest."""
ROOM_OF_FEW = 1.2
"""Factor that the interval of so few rounds is widened by on both sides: what rounds on a quiet machine differ by."""


@dataclass(frozen=True)
class Estimate:
    """A median and the interval that it lies in; distribution-free, from the order of the samples."""

    value: float
    low: float
    high: float


def estimate(samples: Sequence[float]) -> Estimate:
    """The median of positive samples and its interval of 95 %.

    Between the k-th smallest and the k-th largest of n samples the median lies with the probability that neither fewer
    than k nor more than n - k of n fair coins show heads.
    """
    ordered, n = sorted(samples), len(samples)
    if n < FEW:
        return Estimate(median(ordered), ordered[0] / ROOM_OF_FEW, ordered[-1] * ROOM_OF_FEW)
    outside, k = 0.0, 0
    while 2 * (outside + comb(n, k) / 2**n) <= 1 - CONFIDENCE:
        outside += comb(n, k) / 2**n
        k += 1
    return Estimate(median(ordered), ordered[k - 1], ordered[n - k])


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
