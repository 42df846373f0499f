"""Mixed precision within a budget: the smallest file of a wanted SNR, or the best SNR within a size.

Each layer's sensitivity is measured once. An assignment that should do is then tried: its weights are put into the
network and whole trajectories are sampled. Errors do not add up exactly, and a trajectory amplifies them or heals:
what the trial shows moves the target of the next one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dexport.errors import GateError, UsageError
from dexport.exporter.quantize.assign import Options, TradeOff, total_error, total_size
from dexport.exporter.quantize.calibrate import OnProgress

EXAMPLES = 'for example "budget=snr>=25", "budget=size<=2.5MB", or "budget=snr>=25,size<=0.3"'
TRIALS = 8
CLOSE_DB = 0.5
"""An assignment this close above the wanted SNR is not made smaller any more."""
MARGIN_DB = 0.2
"""What a target rises on top of what a trial missed."""
STEP_DB = 6.0
"""Where a trial says only that all is exact, or that nothing is left."""
SOLUTIONS = 60
"""Assignments that are computed; one that was tried before costs nothing."""
CORRECTIONS = 3
"""Of the sizes that the assignment counts with, by that of the real graph."""
MB = 1e6


@dataclass(frozen=True)
class Budget:
    """What is asked for.

    Attributes:
        snr_db: lowest SNR of the final latents after 20 steps.
        fraction: largest file, as a share of that without quantisation.
        megabytes: largest file, in units of 1e6 bytes.
    """

    text: str
    snr_db: float | None = None
    fraction: float | None = None
    megabytes: float | None = None

    def max_bytes(self, float_bytes: int) -> float:
        """The largest file; infinite where any size will do."""
        if self.megabytes is not None:
            return self.megabytes * MB
        return math.inf if self.fraction is None else self.fraction * float_bytes


def parse_budget(text: str) -> Budget:
    """``snr>=DB``, ``size<=SHARE`` or ``size<=NMB``, or an SNR and a size with a comma in between.

    Raises:
        UsageError: something else, or figures that no file can have.
    """
    found: dict[str, float] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(?:snr>=(?P<snr_db>[\d.]+)(?:dB)?|size<=(?P<size>[\d.]+)(?P<unit>MB)?)", part)
        try:
            named = {k: float(v) for k, v in (match.groupdict() if match else {}).items() if v and k != "unit"}
        except ValueError:
            named = {}
        if match is None or not named:
            raise UsageError(f"--quantize budget={text}: {part!r} is no budget", hint=EXAMPLES)
        name = "snr_db" if "snr_db" in named else "megabytes" if match["unit"] else "fraction"
        if name in found or {name, *found} == {"megabytes", "fraction"}:
            raise UsageError(f"--quantize budget={text} says the same thing twice", hint=EXAMPLES)
        found[name] = next(iter(named.values()))
    if not all(value > 0 for value in found.values()) or found.get("fraction", 0) >= 1:
        raise UsageError(
            f"--quantize budget={text}: an SNR is above 0 dB, a size above 0 and below 1 (or in MB)", hint=EXAMPLES
        )
    return Budget(text, **found)


@dataclass(frozen=True)
class Trial:
    """An assignment that was sampled with."""

    snr_db: float
    size: int


@dataclass
class Search:
    """The search for an assignment.

    Attributes:
        options: what every layer costs in every scheme.
        size_of: bytes of the ONNX file of an assignment.
        snr_of: its SNR, from whole trajectories.
        trials: what was tried so far.
    """

    options: Options
    size_of: Callable[[Mapping[str, str]], int]
    snr_of: Callable[[Mapping[str, str]], float]
    on_progress: OnProgress
    trials: list[Trial] = field(default_factory=list)

    @cached_property
    def trade_off(self) -> TradeOff:
        return TradeOff(self.options)

    def meet(self, budget: Budget, float_bytes: int) -> tuple[dict[str, str], Trial]:
        """The assignment that meets a budget, and what it measures.

        Raises:
            GateError: there is none; the message has the closest point.
        """
        limit = budget.max_bytes(float_bytes)
        if budget.snr_db is None:
            schemes = self._within(limit, budget)
            return schemes, self._try(schemes)
        schemes, trial = self._at_least(budget.snr_db)
        if trial.size <= limit:
            return schemes, trial
        schemes = self._within(limit, budget)
        closest = self._try(schemes)
        if closest.snr_db >= budget.snr_db:
            return schemes, closest
        raise GateError(
            f"--quantize budget={budget.text} cannot be met: {budget.snr_db:g} dB takes "
            f"{_shown(trial.size, float_bytes)}, and {_shown(closest.size, float_bytes)} give {closest.snr_db:.1f} dB",
            hint=f'--quantize "budget=snr>={max(math.floor(closest.snr_db), 1)}", or '
            f'--quantize "budget=size<={_megabytes(trial)}"',
        )

    def _at_least(self, snr_db: float) -> tuple[dict[str, str], Trial]:
        """The smallest assignment found whose measured SNR is this at least."""
        tried: list[tuple[dict[str, str], Trial]] = []
        below, above = (-math.inf, -math.inf), (math.inf, math.inf)
        target = snr_db
        for _ in range(SOLUTIONS):
            schemes = self.trade_off.smallest(10 ** (-target / 10))
            assert schemes is not None, "floating point has no error"
            trial = next((trial for known, trial in tried if known == schemes), None)
            if trial is None and len(tried) >= TRIALS and math.isfinite(above[0]):
                break
            if trial is None:
                trial = self._try(schemes)
                tried.append((schemes, trial))
            if 0 <= trial.snr_db - snr_db < CLOSE_DB:
                break
            if trial.snr_db < snr_db:
                below = max(below, (target, trial.snr_db))
            else:
                above = min(above, (target, trial.snr_db))
            target = _next_target(snr_db, below, above)
        return min(((s, t) for s, t in tried if t.snr_db >= snr_db), key=lambda pair: pair[1].size)

    def _within(self, limit: float, budget: Budget) -> dict[str, str]:
        """The most exact assignment whose file fits; sizes of layers are estimates, which the real graph corrects."""
        allowed, base = limit, self._base()
        for _ in range(CORRECTIONS):
            schemes = self.trade_off.most_exact(allowed - base)
            if schemes is None:
                break
            excess = self.size_of(schemes) - limit
            if excess <= 0:
                return schemes
            allowed -= excess
        least = {path: min(schemes, key=lambda scheme: schemes[scheme].size) for path, schemes in self.options.items()}
        trial = self._try(least)
        if trial.size <= limit:
            return least
        raise GateError(
            f"--quantize budget={budget.text} cannot be met: the smallest file has {trial.size / MB:.2f} MB "
            f"({trial.snr_db:.1f} dB)",
            hint=f'--quantize "budget=size<={_megabytes(trial)}"',
        )

    def _base(self) -> float:
        """Bytes of the file besides the layers."""
        exact = {path: min(schemes, key=lambda scheme: schemes[scheme].error) for path, schemes in self.options.items()}
        return self.size_of(exact) - total_size(self.options, exact)

    def _try(self, schemes: Mapping[str, str]) -> Trial:
        predicted = total_error(self.options, schemes)
        shown = f"{-10 * math.log10(predicted):.1f} dB" if predicted else "exact"
        self.on_progress(len(self.trials), TRIALS, f"trial {len(self.trials) + 1}, expecting {shown}")
        trial = Trial(self.snr_of(schemes), self.size_of(schemes))
        self.trials.append(trial)
        return trial


def _next_target(snr_db: float, below: tuple[float, float], above: tuple[float, float]) -> float:
    """The predicted SNR to ask for next, from (predicted, measured) pairs that fall short and that suffice."""
    (low, low_db), (high, high_db) = below, above
    if math.isinf(high):
        return low + (snr_db - low_db + MARGIN_DB if math.isfinite(low_db) else STEP_DB)
    if math.isinf(low):
        return high - (high_db - snr_db if math.isfinite(high_db) else STEP_DB)
    share = (snr_db + MARGIN_DB - low_db) / (high_db - low_db) if math.isfinite(high_db - low_db) else 0.5
    return low + min(max(share, 0.1), 0.9) * (high - low)


def _megabytes(trial: Trial) -> str:
    """A limit that this file fits into."""
    return f"{math.ceil(trial.size / MB * 100) / 100:.2f}MB"


def _shown(size: int, float_bytes: int) -> str:
    return f"{size / MB:.2f} MB ({size / float_bytes:.2f} of the float file)"
