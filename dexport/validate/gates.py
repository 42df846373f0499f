"""Gates of a validation: named metrics, their limits, and verdicts that take an interval for what it is."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dexport.errors import UsageError
from dexport.validate.features.evaluator import Evaluator
from dexport.verdict import SHIPPABLE_L2, SHIPPABLE_SNR_DB

PASS, LOSSY, FAIL, INCONCLUSIVE = "pass", "lossy", "FAIL", "inconclusive"
WORSE = "worse"
"""Of a change against a baseline."""
HOPELESS = 100
"""Times that an interval reaches beyond a limit: its square is how many times as many images would settle it."""
UNDER, OVER = "--fail-under", "--fail-over"


@dataclass(frozen=True)
class Metric:
    """What a gate can judge.

    Attributes:
        level: where it is measured.
        option: ``--fail-under`` where more is better, ``--fail-over`` where less is.
        shippable: the worst value that is fit to ship, whatever a gate allows; None where there is none.
    """

    level: str
    option: str
    meaning: str
    shippable: float | None = None


OF_VALIDATION: Mapping[str, Metric] = {
    "op_l2": Metric("op", OVER, "relative L2 of a custom op"),
    "block_l2": Metric("op", OVER, "relative L2 of a block on exact inputs"),
    "altered_blocks": Metric("op", OVER, "blocks that compute something else than an export, rounding aside"),
    "relative_l2": Metric("forward", OVER, "relative L2 of one evaluation", SHIPPABLE_L2),
    "max_abs": Metric("forward", OVER, "largest difference of one evaluation"),
    "cosine": Metric("forward", UNDER, "cosine similarity of one evaluation"),
    "snr": Metric("trajectory", UNDER, "SNR in dB of the final latents", SHIPPABLE_SNR_DB),
    "tokens": Metric("trajectory", UNDER, "share of the ids that steps decide alike at PyTorch's states"),
    "evaluation_l2": Metric("trajectory", OVER, "relative L2 of an evaluation at PyTorch's states"),
    "psnr": Metric("trajectory", UNDER, "PSNR in dB of the worst picture"),
    "ssim": Metric("trajectory", UNDER, "SSIM of the worst picture"),
    "lpips": Metric("trajectory", OVER, "LPIPS (AlexNet) of the worst picture"),
    "fid_delta": Metric("distribution", OVER, "FID, bundle minus PyTorch"),
    "kid_delta": Metric("distribution", OVER, "KID, bundle minus PyTorch"),
    "frechet_delta": Metric("distribution", OVER, "another network's Fréchet distance, bundle minus PyTorch"),
    "kernel_delta": Metric("distribution", OVER, "another network's kernel distance, bundle minus PyTorch"),
}
OF_BENCH: Mapping[str, Metric] = {
    "speedup": Metric("bench", UNDER, "how many times as fast as PyTorch eager on the same device"),
    "speedup_against": Metric("bench", UNDER, "how many times as fast as the other model"),
    "wall_ms": Metric("bench", OVER, "median milliseconds of one evaluation"),
}
METRICS: Mapping[str, Metric] = {**OF_VALIDATION, **OF_BENCH}
OF_INCEPTION = {"fid_delta": "frechet_delta", "kid_delta": "kernel_delta"}
"""Names that the published Inception alone deserves, and what other networks' are called."""


@dataclass(frozen=True)
class Gate:
    """One judged metric.

    Attributes:
        value: None where it is not finite, or was not measured because something before it failed.
        low, high: the interval of the value, where it is an estimate.
        source: ``default`` or the option that gave the limit.
        where: the check, part or step that the value is of.
        count: samples behind an estimate.
        undecided: why a measurement can say nothing about the limit; empty where it can.
    """

    metric: str
    value: float | None
    limit: float
    source: str = "default"
    where: str = ""
    low: float | None = None
    high: float | None = None
    count: int | None = None
    undecided: str = ""

    @property
    def verdict(self) -> str:
        """``pass``, ``lossy``, ``FAIL`` or ``inconclusive``.

        An estimate fails by its own value, and passes only where its whole interval does: between the two it has not
        been shown that the limit holds, so the run does not pass either. What is within a limit and not fit to ship is
        ``lossy``.
        """
        if self.undecided:
            return INCONCLUSIVE
        if self.value is None or math.isnan(self.value) or self._beyond(self.value):
            return FAIL
        ends = [end for end in (self.low, self.high) if end is not None]
        if any(map(self._beyond, ends)):
            return INCONCLUSIVE
        shippable = METRICS[self.metric].shippable
        return LOSSY if shippable is not None and self._beyond(self.value, shippable) else PASS

    @property
    def advice(self) -> str:
        """What would settle a gate that is not decided; empty for any other."""
        if self.undecided:
            return self.undecided
        if self.value is None or self.low is None or self.high is None or self.count is None:
            return ""
        room = abs(self.limit - self.value)
        reach = (self.high - self.value) if self.value <= self.limit else (self.value - self.low)
        if reach <= room:
            return ""
        if reach > HOPELESS * room:
            return "the value lies on the limit: more images will not settle it"
        needed = self.count * (reach / room) ** 2
        return f"its interval spans the limit: about {float(f'{needed:.2g}'):,.0f} images would settle it (--count)"

    def _beyond(self, value: float, limit: float | None = None) -> bool:
        limit = self.limit if limit is None else limit
        return value > limit if METRICS[self.metric].option == OVER else value < limit

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        metric = METRICS[self.metric]
        return {
            "metric": self.metric,
            "level": metric.level,
            "meaning": metric.meaning,
            "better": "lower" if metric.option == OVER else "higher",
            **{name: _finite(value) for name, value in asdict(self).items() if name not in ("metric", "undecided")},
            "verdict": self.verdict,
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Limits:
    """Limits that the user gave, by metric."""

    given: Mapping[str, float] = field(default_factory=dict)

    def get(self, metric: str, default: float) -> float:
        """The user's limit, else the default."""
        return self.given.get(metric, default)

    def source(self, metric: str) -> str:
        """Where the limit of a metric comes from."""
        return METRICS[metric].option if metric in self.given else "default"


def verdict_of(gates: Sequence[str], changes: Sequence[str] = ()) -> str:
    """``failed`` by one gate or one change for the worse, ``inconclusive`` or ``lossy`` by one that is, else
    ``passed``."""
    if FAIL in gates or WORSE in changes:
        return "failed"
    if not gates:
        return "not run"
    if INCONCLUSIVE in gates:
        return "inconclusive"
    return LOSSY if LOSSY in gates else "passed"


def parse_limits(
    under: Sequence[str] = (), over: Sequence[str] = (), known: Mapping[str, Metric] = OF_VALIDATION
) -> Limits:
    """``("snr=25",), ("fid_delta=0.3",)`` -> limits.

    Args:
        known: what the command measures.

    Raises:
        UsageError: another form, a metric that does not exist, or one that the other option takes.
    """
    given: dict[str, float] = {}
    for option, texts in ((UNDER, under), (OVER, over)):
        for text in texts:
            name, _, number = text.partition("=")
            metric = known.get(name)
            if metric is None:
                near = difflib.get_close_matches(name, known, n=2)
                raise UsageError(
                    f"{option} {text!r}: there is no metric {name!r}",
                    hint=f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}",
                )
            if metric.option != option:
                better = "less" if metric.option == OVER else "more"
                raise UsageError(
                    f"{option} {text!r}: of {name}, {better} is better", hint=f"give it as {metric.option} {text}"
                )
            if name in given:
                raise UsageError(f"{option} {text!r}: {name} has a limit already", hint="give one limit per metric")
            given[name] = _number(option, name, number)
    return Limits(given)


def check_limits(limits: Limits, levels: Sequence[str], evaluator: Evaluator | None) -> None:
    """Refuse limits on what will not be measured, before any work.

    Raises:
        UsageError: a metric of a level that does not run, or of another feature network.
    """
    for name in limits.given:
        level = METRICS[name].level
        if level not in levels:
            raise UsageError(f"{name} is measured by the level {level}, which does not run", f"add --level {level}")
        if evaluator is None or level != "distribution":
            continue
        if name not in delta_metrics(evaluator):
            other = OF_INCEPTION.get(name) or next(k for k, v in OF_INCEPTION.items() if v == name)
            raise UsageError(
                f"{name} is not measured with the evaluator {evaluator.name}: its distance is called "
                f"{evaluator.distance}",
                hint=f"give it as {other}",
            )


def delta_metrics(evaluator: Evaluator) -> tuple[str, str]:
    """The names of the differences of an evaluator's Fréchet and kernel distances."""
    return tuple(OF_INCEPTION) if evaluator.distance == "FID" else tuple(OF_INCEPTION.values())  # type: ignore[return-value]


def _number(option: str, name: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{option} {name}={number} is not NAME=NUMBER", hint=f"for example {option} {name}=25")
    return value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
