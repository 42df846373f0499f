"""The gates of each level: what was measured, beside the limit that judges it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from dexport.errors import UsageError
from dexport.validate.compare.block_errors import BlockError
from dexport.validate.features.evaluator import Evaluator
from dexport.validate.gates import METRICS, Gate, Limits, delta_metrics
from dexport.validate.levels.distribution import DistributionReport
from dexport.validate.levels.forward import Check, ParityReport
from dexport.validate.levels.ops import OpReport
from dexport.validate.levels.trajectory import TrajectoryReport


def op_gates(report: OpReport, limits: Limits) -> Iterable[Gate]:
    """The custom op that is nearest to its limit, or furthest beyond it."""
    if not report.checks:
        if "op_l2" in limits.given:
            raise UsageError("op_l2 has a limit, and no custom op was run", hint="leave it out")
        return
    worst = max(report.checks, key=lambda check: _excess(check.metrics.relative_l2, check.gate))
    where = f"{worst.op} of {worst.module}, {worst.dtype}"
    yield Gate("op_l2", worst.metrics.relative_l2, worst.gate, limits.source("op_l2"), where)


def block_gates(blocks: Mapping[str, Sequence[BlockError]], limits: Limits) -> Iterable[Gate]:
    """How exact the worst block is, and how many are not what an export writes, however little it does.

    The second is not judged where no block can be compared with an export in its own precision.
    """
    found = [(": ".join(filter(None, (name, block.path))), block) for name, some in blocks.items() for block in some]
    if not found:
        return
    where, worst = max(found, key=lambda pair: _excess(pair[1].own if pair[1].finite else math.nan, pair[1].allowed))
    own = worst.own if worst.finite else math.nan
    yield Gate("block_l2", own, worst.allowed, limits.source("block_l2"), where or "outside of blocks")
    known = [(path, block) for path, block in found if block.comparable]
    if not known:  # told as not run
        return
    altered = [path or "outside of blocks" for path, block in known if block.altered]
    where = ", ".join(altered) or f"{len(known)} blocks"
    limit = limits.get("altered_blocks", 0)
    yield Gate("altered_blocks", len(altered), limit, limits.source("altered_blocks"), where)


def not_compared(blocks: Mapping[str, Sequence[BlockError]], limits: Limits) -> list[str]:
    """Networks whose blocks are judged by their errors alone."""
    unknown = [name for name, some in blocks.items() if not all(block.comparable for block in some)]
    if unknown and len(unknown) == len(blocks) and "altered_blocks" in limits.given:
        raise UsageError(
            "altered_blocks has a limit, and what quantised layers should hold is not known",
            hint="leave it out; block_l2 judges their errors",
        )
    return [f"{name and f'{name}: '}altered blocks: what quantised layers should hold is not known" for name in unknown]


def forward_gates(forward: Mapping[str, ParityReport], limits: Limits) -> Iterable[Gate]:
    """The worst check of every judged figure, over all graphs."""
    checks = [(name, check) for name, report in forward.items() for check in report.checks]
    if not checks:
        return

    def gate(metric: str, limit: Callable[[Check], float], value: Callable[[Check], float], sign: int) -> Gate:
        def badness(check: Check) -> float:
            excess = _excess(value(check), limit(check) if sign > 0 else 1)
            return sign * excess if check.metrics.finite else math.inf

        name, worst = max(checks, key=lambda pair: badness(pair[1]))
        where = f"{name and f'{name}, '}{worst.kind}, batch {worst.batch}"
        shown = value(worst) if worst.metrics.finite else math.nan
        return Gate(metric, shown, limit(worst), limits.source(metric), where)

    yield gate("relative_l2", lambda check: check.gate, lambda check: check.metrics.relative_l2, 1)
    if "max_abs" in limits.given:
        yield gate("max_abs", lambda _: limits.given["max_abs"], lambda check: check.metrics.max_abs, 1)
    if "cosine" in limits.given:
        yield gate("cosine", lambda _: limits.given["cosine"], lambda check: check.metrics.cosine, -1)


def _excess(value: float, limit: float) -> float:
    """How far a value is towards a limit; what is not a number is furthest."""
    return math.inf if math.isnan(value) else value / limit if limit > 0 else value


def trajectory_gates(report: TrajectoryReport, limits: Limits) -> Iterable[Gate]:
    """The final states, or the logits where these are ids; and the figures along the run that have a limit."""
    last, worst = report.states[-1].metrics, report.worst_evaluation
    if report.tokens is None or "snr" in limits.given:
        snr = last.snr_db if last.finite else math.nan
        yield Gate("snr", snr, report.gate_snr_db, limits.source("snr"), report.run)
    error = worst.metrics.relative_l2 if worst.metrics.finite else math.nan
    if report.tokens is not None and "evaluation_l2" not in limits.given:
        yield Gate("evaluation_l2", error, report.tokens.gate_l2, where=f"t = {worst.t:g}")
    measured = {
        "tokens": (math.nan if report.tokens is None else report.tokens.share, report.run),
        "evaluation_l2": (error, f"t = {worst.t:g}"),
        "psnr": (min(report.psnr_db, default=math.nan), "worst picture"),
        "ssim": (min(report.ssim, default=math.nan), "worst picture"),
        "lpips": (max(report.lpips, default=math.nan), "worst picture"),
    }
    for name, (value, where) in measured.items():
        if name in limits.given:
            yield Gate(name, value, limits.given[name], METRICS[name].option, where)


def distribution_gates(
    report: DistributionReport, evaluator: Evaluator, limits: Limits, share: float
) -> Iterable[Gate]:
    """The differences of distances to real images, with their intervals."""
    frechet, kernel = delta_metrics(evaluator)
    delta = report.delta
    estimate = {"low": delta.low, "high": delta.high, "count": delta.count}
    where = f"{report.count:,} images, {report.distance}"
    limit = limits.get(frechet, share * abs(delta.b))
    yield Gate(frechet, delta.delta, limit, limits.source(frechet), where, **estimate)  # type: ignore[arg-type]
    if kernel in limits.given:
        found = report.kernel_delta
        if found is None:
            yield Gate(kernel, None, limits.given[kernel], limits.source(kernel), "not measured: no real images")
        else:
            estimate = {"low": found.low, "high": found.high, "count": found.count}
            where = f"{report.count:,} images, {report.kernel_distance}"
            yield Gate(kernel, found.delta, limits.given[kernel], limits.source(kernel), where, **estimate)  # type: ignore[arg-type]
