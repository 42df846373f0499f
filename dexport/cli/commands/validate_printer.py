"""What ``dexport validate`` found, level by level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dexport.cli.commands.bench_printer import print_gates
from dexport.cli.commands.compare_printer import print_parity
from dexport.cli.terminal import colored, out
from dexport.verdict import ACCEPT, LOSSY, lossy_text

if TYPE_CHECKING:
    from dexport.validate.levels.distribution import DistributionReport
    from dexport.validate.levels.ops import OpReport
    from dexport.validate.levels.trajectory import TrajectoryReport
    from dexport.validate.validate import Validation

ROWS = 12
"""Steps of a trajectory that a table shows."""

CLOSE = 1e-5
"""Of a time that went through another unit."""


def print_validation(result: Validation) -> None:
    """What ``dexport validate`` found: level by level, then the gates and the verdict."""
    if result.ops is not None and result.ops.checks:
        print_ops(result.ops)
    for name, report in result.forward.items():
        print_parity(report, name)
    if result.trajectory is not None:
        print_trajectory(result.trajectory)
    if result.distribution is not None:
        print_distribution(result.distribution)
    print_gates(result.gates)
    for change in result.changes:
        if change.verdict != "same":
            before, now = (f"{value:.4g}" if value is not None else "-" for value in (change.before, change.now))
            color = "red" if change.verdict == "worse" else "green"
            moved = f" than the baseline: {change.metric} {before} -> {now} ({change.text})"
            out.print(Text.assemble((change.verdict, color), moved))
    for reason in result.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)
    if result.verdict == LOSSY:
        accepted = "accepted" if result.acceptable else f"not accepted ({ACCEPT})"
        out.print(Text.assemble(("LOSSY", "yellow"), f", {accepted}: {lossy_text(result.loss)}"), soft_wrap=True)
    elif str(result.loss):
        out.print(f"lost: {result.loss}", soft_wrap=True)
    out.print(Text.assemble(f"{result.bundle}: ", colored(result.verdict)))


def print_ops(report: OpReport) -> None:
    """The custom ops by themselves."""
    table = Table("op", "first in", "nodes", "type", "shapes", "relative L2", "gate", "result", title="custom ops")
    for check in report.checks:
        shapes = " ".join("x".join(map(str, shape)) for shape in check.shapes)
        figures = (
            f"{check.metrics.relative_l2:.2e}",
            f"{check.gate:.0e}",
            colored("pass" if check.passed else "FAIL"),
        )
        table.add_row(check.op, check.module, str(check.nodes), check.dtype, shapes, *figures)
    out.print(table)


def print_distribution(report: DistributionReport) -> None:
    """The paired delta first: absolute distances mean little at this many images."""
    title = f"{report.count:,} images each, {report.run}, seed {report.seed}: {report.evaluator}"
    table = Table("distance", "delta", "95 % interval", "bundle", "PyTorch", "floor", title=title)
    floor = report.floor
    for name, delta, real in (
        (report.distance, report.delta, floor and floor.frechet),
        (report.kernel_distance, report.kernel_delta, floor and floor.kernel),
    ):
        if delta is not None:
            interval = f"[{delta.low:+.3g}, {delta.high:+.3g}]"
            known = "not known" if real is None else f"{real:.4g}"
            table.add_row(name, f"{delta.delta:+.3g}", interval, f"{delta.a:.4g}", f"{delta.b:.4g}", known)
    out.print(table)
    out.print(f"evaluator: {report.evaluator}, {report.weights or 'no weights'}", soft_wrap=True)
    if floor:
        out.print(f"floor: {floor.count:,} real images against {floor.against:,} others")
    if report.lowest_psnr_db is not None:
        out.print(f"pictures: PSNR at least {report.lowest_psnr_db:.1f} dB, {report.equal} of {report.count} equal")
    for warning in report.warnings:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)


def print_trajectory(report: TrajectoryReport) -> None:
    """The table of steps: at most a dozen, evenly spread, the last among them."""
    from dexport.validate.report.parity_table import WORDS

    images = f"{len(report.labels)} image{'s' * (len(report.labels) > 1)}"
    title = f"{report.run}, {images}: {report.runner} against {report.reference}"
    table = Table("step", "t", "state SNR dB", "state relative L2", "evaluation relative L2", title=title)
    count = len(report.states)
    shown = sorted({round(index * (count - 1) / (ROWS - 1)) for index in range(ROWS)})
    for index in shown:
        state = report.states[index]
        local = [
            at.metrics.relative_l2
            for at in report.evaluations
            if math.isclose(at.t, state.t, rel_tol=CLOSE, abs_tol=CLOSE)
        ]
        row = (f"{state.metrics.snr_db:.1f}", f"{state.metrics.relative_l2:.2e}")
        table.add_row(str(index + 1), f"{state.t:g}", *row, f"{max(local):.2e}" if local else "-")
    out.print(table)
    last, worst = report.states[-1].metrics, report.worst_evaluation
    final = f"final states: SNR {last.snr_db:.1f} dB, gate {report.gate_snr_db:g} dB: "
    if report.tokens is not None:
        final = f"logits: relative L2 {worst.metrics.relative_l2:.2e}, gate {report.tokens.gate_l2:g}: "
    out.print(Text.assemble(final, colored(WORDS[report.status])))
    out.print(f"worst evaluation: relative L2 {worst.metrics.relative_l2:.2e} at t = {worst.t:g}")
    out.print(report.drift)
    if report.psnr_db:
        psnr, ssim = f"PSNR at least {min(report.psnr_db):.1f} dB", f"SSIM at least {min(report.ssim):.5f}"
        lpips = f"LPIPS at most {max(report.lpips):.4f}" if report.lpips else "LPIPS not measured"
        out.print(f"pictures: {psnr}, {ssim}, {lpips}")
