"""Views of a parity report: JSON is the truth, this is how people read it."""

from __future__ import annotations

from dexport.validate.parity import Check, ParityReport

COLUMNS = ("check", "batch", "output", "max abs", "relative L2", "cosine", "SNR dB", "gate", "result")


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
        f"{check.gate:.0e}",
        "pass" if check.passed else "FAIL" if m.finite else "FAIL: NaN or Inf",
    )


def markdown(report: ParityReport, title: str, weights: str) -> str:
    """The report as a Markdown page."""
    lines = [
        f"# Parity: {title}",
        "",
        f"**{'Passed' if report.passed else 'FAILED'}**, {report.precision} against {report.reference}.",
        f"Weights: {weights}.",
        f"Timesteps of the rows: {', '.join(f'{t:g}' for t in report.timesteps)}." if report.timesteps else "",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(report)),
        "",
        "`as shipped`: the file in ONNX Runtime. `rounded`: the same graph with the rounding of every activation made",
        "explicit, which ONNX Runtime leaves out on a CPU. `batch consistency`: a row against itself in other slots.",
        "",
        *(f"Not run: {reason}." for reason in report.not_run),
    ]
    return "\n".join(lines) + "\n"
