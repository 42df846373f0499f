"""What ``dexport fid`` measured, or wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dexport.cli.terminal import out, print_lines
from dexport.printable import printable

if TYPE_CHECKING:
    from dexport.validate.fid import FidReport, SetFacts


def print_fid(report: FidReport) -> None:
    """Counts first: no distance means anything without them."""
    lines = {
        "evaluator": f"{report.evaluator}, {report.weights or 'no weights'}",
        "weights": f"sha256 {report.weights_sha256}" if report.weights_sha256 else "",
        "samples": _set_line(report.samples),
        "reference": _set_line(report.reference),
        "seed": str(report.seed),
    }
    print_lines({name: text for name, text in lines.items() if text})
    for skipped in report.skipped:
        out.print(_skipped_line(vars(skipped)), soft_wrap=True)
    table = Table("distance", "", "floor")
    floor = report.floor
    table.add_row(report.distance, f"{report.frechet:.4f}", f"{floor.frechet:.4f}" if floor else "not known")
    if report.spatial is not None:
        table.add_row(report.spatial_distance, f"{report.spatial:.4f}", "")
    if report.kernel is not None:
        mean, deviation = (1000 * value for value in report.kernel)
        name = "KID" if report.distance == "FID" else "kernel distance"
        shown = f"{1000 * floor.kernel:.3f}" if floor else "not known"
        table.add_row(f"{name} x 1000", f"{mean:.3f} ± {deviation:.3f}", shown)
    if report.rbf is not None:
        shown = f"{1000 * floor.rbf:.4f}" if floor else "not known"
        table.add_row("RBF distance x 1000", f"{1000 * report.rbf:.4f}", shown)
    if report.precision_recall is not None:
        table.add_row("precision, recall", "{:.3f}, {:.3f}".format(*report.precision_recall), "")
    if report.score is not None:
        table.add_row("Inception Score of the samples", "{:.3f} ± {:.3f}".format(*report.score), "")
    out.print(table)
    if floor:
        out.print(f"floor: {floor.count:,} images of the reference against {floor.against:,} others of it")
    for warning in report.warnings:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)


def print_saved_statistics(facts: Mapping[str, Any]) -> None:
    """What ``dexport fid --save-stats`` wrote."""
    out.print(f"{facts['path']}: {facts['count']} images, {facts['evaluator']}", soft_wrap=True)
    for skipped in facts["skipped"]:
        out.print(_skipped_line(skipped), soft_wrap=True)
    for warning in facts["warnings"]:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)


def _skipped_line(skipped: Mapping[str, Any]) -> str:
    names = [*map(printable, skipped["names"]), *(["..."] if skipped["count"] > len(skipped["names"]) else [])]
    return f"skipped in {skipped['path']}: {skipped['count']} {skipped['why']} ({', '.join(names)})"


def _set_line(facts: SetFacts) -> str:
    return f"{'an unknown number of' if facts.count is None else f'{facts.count:,}'} images, {facts.path}"
