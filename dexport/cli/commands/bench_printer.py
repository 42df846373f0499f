"""The tables of ``dexport bench``, and judged gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dexport.cli.terminal import colored, out

if TYPE_CHECKING:
    from dexport.validate.bench.bench import BenchReport
    from dexport.validate.gates import Gate


def print_bench(report: BenchReport) -> None:
    """One table per batch size, then the gates."""
    for result in report.results:
        of = "" if result.gflop is None else f", {result.gflop:.4g} GFLOP, peak {result.peak_gflop_s:.4g} GFLOP/s"
        table = Table(
            *("", "runs on", "wall", "fastest", "processor", "images/s", "to PyTorch", "to other", "of peak"),
            title=f"batch {result.batch}{of}; {report.rounds} rounds, {report.threads} threads, load {result.load:.1f}",
        )
        for row in result.rows:
            times = (f"{value:.1f} ms" for value in (row.wall_ms, row.fastest_ms, row.cpu_ms))
            ratios = ("-" if value is None else f"{value:.2f}x" for value in (row.speedup, row.speedup_against))
            peak = "-" if row.of_peak is None else f"{row.of_peak:.0%}"
            name = f"{row.owner}, {row.kind}"
            table.add_row(name, row.runner, *times, f"{row.images_per_s:.3g}", *ratios, peak)
        out.print(table)
    if report.gates:
        print_gates(report.gates)
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)


def print_gates(gates: Sequence[Gate]) -> None:
    """Every judged metric."""
    from dexport.validate.report.views.text import limit_of, value_of

    table = Table("gate", "value", "limit", "of", "result", title="gates")
    for gate in gates:
        shown = gate.to_json()
        table.add_row(gate.metric, value_of(shown), limit_of(shown), gate.where, colored(gate.verdict))
    out.print(table)
    for gate in gates:
        if gate.advice:
            out.print(Text.assemble((gate.metric, "yellow"), f": {gate.advice}"), soft_wrap=True)
