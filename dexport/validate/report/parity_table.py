"""Views of a parity report: JSON is the truth, this is how people read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dexport.printable import markdown_text
from dexport.validate.levels.forward import Check, ParityReport
from dexport.verdict import FAILED, LOSSY, PASSED, lossy_text

COLUMNS = ("check", "batch", "output", "max abs", "relative L2", "cosine", "SNR dB", "gate", "result")


WORDS = {PASSED: "pass", LOSSY: "lossy", FAILED: "FAIL"}
"""Of one check."""
TITLES = {PASSED: "Passed", LOSSY: "LOSSY", FAILED: "FAILED"}


def word(check: Mapping[str, Any]) -> str:
    """``pass``, ``lossy`` or ``FAIL`` of a check in a stored report."""
    return WORDS[check["status"]] if check["passed"] else WORDS[FAILED]


def gate_text(gate: float) -> str:
    """A limit in as few digits as it has, two at most: ``3e-03``, ``5.6e-02``."""
    short = f"{gate:.0e}"
    return short if math.isclose(float(short), gate, rel_tol=1e-9) else f"{gate:.1e}"


def lost(report: ParityReport) -> str:
    """What was lost; of a lossy network also where the line is."""
    return lossy_text(report.loss) if report.status == LOSSY else str(report.loss)


def rows(report: ParityReport) -> list[tuple[str, ...]]:
    """One row of text per check, in the order of ``COLUMNS``."""
    return [_row(check) for check in report.checks]


def _row(check: Check) -> tuple[str, ...]:
    m = check.metrics
    return (
        check.kind,
        str(check.batch),
        check.output,
        f"{m.max_abs:.2e}",
        f"{m.relative_l2:.2e}",
        f"{m.cosine:.7f}",
        f"{m.snr_db:.1f}",
        gate_text(check.gate),
        WORDS[check.status] if m.finite else "FAIL: NaN or Inf",
    )


def markdown(report: ParityReport, title: str, weights: str) -> str:
    """The report as a Markdown page."""
    lines = [
        f"# Parity: {markdown_text(title)}",
        "",
        f"**{TITLES[report.status]}**, {report.precision} against {report.reference}.",
        f"Lost: {lost(report)}.",
        f"Weights: {markdown_text(weights)}.",
        f"Timesteps of the rows: {', '.join(f'{t:g}' for t in report.timesteps)}." if report.timesteps else "",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(map(markdown_text, row)) + " |" for row in rows(report)),
        "",
        "`as shipped`: the file in ONNX Runtime. `rounded`: the same graph with the rounding of every activation made",
        "explicit, which ONNX Runtime leaves out on a CPU. `batch consistency`: a row against itself in other slots.",
        "",
        *(f"Note: {markdown_text(note)}." for note in report.notes),
        *(f"Not run: {markdown_text(reason)}." for reason in report.not_run),
    ]
    return "\n".join(lines) + "\n"
