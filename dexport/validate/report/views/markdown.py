"""The report for a pull request or a step summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dexport.printable import markdown_text, printable_values
from dexport.validate.report.parity_table import gate_text, word
from dexport.validate.report.views import text
from dexport.verdict import LOSSY

ICONS = {"passed": "✅", "failed": "❌", "lossy": "⚠️", "inconclusive": "⚠️", "not run": "⚠️"}
LONGEST = 12
"""Rows of a table of steps."""


def markdown(report: Mapping[str, Any]) -> str:
    """The report as GitHub's Markdown: verdict and gates first, details folded."""
    return "\n".join(_lines(printable_values(report))) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    bundle = report["bundle"]
    yield f"## {ICONS[report['verdict']]} {markdown_text(bundle['name'])}: {report['verdict']}"
    yield ""
    about = f"{text.precision(report)}, {text.settings(report)}; {text.weights(report)}"
    yield f"{text.headline(report)}. {markdown_text(about)}."
    yield ""
    if lost := text.lost(report):
        yield f"{'**Lossy**' if report['verdict'] == LOSSY else 'Lost'}: {markdown_text(lost)}."
        yield ""
    yield from _gates(report)
    yield from _baseline(report)
    for reason in report["not_run"]:
        yield f"- not run: {markdown_text(reason)}"
    if report["not_run"]:
        yield ""
    if (trajectory := report["trajectory"]) is not None:
        yield from _folded(f"Trajectory: {trajectory['drift']}", _trajectory(trajectory))
    if (distribution := report["distribution"]) is not None:
        yield from _folded(
            f"Distribution: {distribution['count']:,} images from the same noise", _distances(distribution)
        )
    if report["forward"] is not None:
        yield from _folded("Single evaluations", _forward(report["forward"]))
    if report["ops"] is not None and report["ops"]["checks"]:
        yield from _folded("Custom ops", _ops(report["ops"]["checks"]))
    packages = report["environment"]["packages"]
    versions = (f"{name} {packages[name]}" for name in ("torch", "onnxruntime", "onnx") if name in packages)
    made = f"dexport {report['dexport']}, {report['date']}, Python {report['environment']['python']}"
    yield f"<sub>{markdown_text(', '.join((made, *versions)))}</sub>"


def _gates(report: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for gate in report["gates"]:
        note = markdown_text(gate["advice"] or gate["where"])
        rows.append((_code(gate["metric"]), text.value_of(gate), text.limit_of(gate), _bold(gate["verdict"]), note))
    yield from _table(("gate", "value", "limit", "result", "of"), rows)


def _baseline(report: Mapping[str, Any]) -> Iterator[str]:
    baseline = report["baseline"]
    if baseline is None:
        return
    yield f"Against the baseline {_code(baseline['path'])} of {markdown_text(baseline['date'][:10])}:"
    yield ""
    rows = [
        (
            _code(change["metric"]),
            _figure(change, "before"),
            _figure(change, "now"),
            markdown_text(change["text"]),
            _bold({"worse": "WORSE"}.get(change["verdict"], change["verdict"])),
        )
        for change in baseline["changes"]
    ]
    yield from _table(("metric", "baseline", "now", "change", ""), rows)
    tools = list(text.changed_tools(report))
    if tools:
        yield f"Tools that are not the baseline's: {markdown_text(', '.join(tools))}."
        yield ""
    if baseline["files"]:
        yield f"Files that are not the baseline's: {', '.join(map(_code, baseline['files']))}."
        yield ""


def _figure(change: Mapping[str, Any], name: str) -> str:
    return "-" if change[name] is None else text.figure(change["metric"], change[name])


def _trajectory(report: Mapping[str, Any]) -> Iterator[str]:
    states = report["states"]
    count = len(states)
    shown = sorted({round(index * (count - 1) / (LONGEST - 1)) for index in range(LONGEST)})
    rows = []
    for index in shown:
        state = states[index]
        local = [at["relative_l2"] for at in report["evaluations"] if at["t"] == state["t"]]
        worst = max((value for value in local if value is not None), default=None)
        rows.append(
            (str(index + 1), f"{state['t']:g}", _number(state["relative_l2"]), _number(worst) if local else "-")
        )
    yield from _table(("step", "t", "state relative L2", "evaluation relative L2"), rows)
    if report["psnr_db"]:
        finite = [value for value in report["psnr_db"] if value is not None]
        lowest = f"at least {min(finite):.1f} dB" if finite else "equal"
        lpips = f"LPIPS at most {max(report['lpips']):.4f}" if report["lpips"] else "LPIPS not measured"
        yield f"Pictures: PSNR {lowest}, SSIM at least {min(report['ssim']):.5f}, {lpips}."
        yield ""


def _distances(report: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for title, metric, delta in (
        (report["distance"], "frechet_delta", report["delta"]),
        (report["kernel_distance"], "kernel_delta", report["kernel_delta"]),
    ):
        if delta is not None:
            interval = f"[{text.figure(metric, delta['low'])}, {text.figure(metric, delta['high'])}]"
            values = (f"{delta[side]:.4g}" for side in ("a", "b"))
            rows.append((markdown_text(title), f"**{text.figure(metric, delta['delta'])}** {interval}", *values))
    yield from _table(("distance", "paired delta, 95 % interval", "bundle", "PyTorch"), rows)
    floor = report["floor"]
    known = (
        f"{floor['frechet']:.4g} ({floor['count']:,} real images against {floor['against']:,} others)"
        if floor
        else "not known"
    )
    real = "an unknown number of" if report["real_count"] is None else f"{report['real_count']:,}"
    evaluator = markdown_text(report["evaluator"])
    yield f"{report['count']:,} images each, {real} real ones; floor {known}; evaluator {evaluator}."
    yield ""
    for warning in report["warnings"]:
        yield f"- {markdown_text(warning)}"
    if report["warnings"]:
        yield ""


def _forward(forward: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            markdown_text(part or "network"),
            markdown_text(check["kind"]),
            str(check["batch"]),
            _number(check["metrics"]["relative_l2"]),
            _number(check["metrics"]["max_abs"]),
            gate_text(check["gate"]),
            _bold(word(check)),
        )
        for part, report in forward.items()
        for check in report["checks"]
    ]
    yield from _table(("network", "check", "batch", "relative L2", "max abs", "gate", "result"), rows)


def _ops(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [
        (
            markdown_text(check["op"]),
            _code(check["module"]),
            str(check["nodes"]),
            markdown_text(check["dtype"]),
            " ".join("x".join(map(str, shape)) for shape in check["shapes"]),
            _number(check["metrics"]["relative_l2"]),
            "pass" if check["passed"] else "**FAIL**",
        )
        for check in checks
    ]
    yield from _table(("op", "first in", "nodes", "type", "shapes", "relative L2", "result"), rows)


def _folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"<details><summary>{markdown_text(title)}</summary>"
    yield ""
    yield from lines
    yield "</details>"
    yield ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _code(value: str) -> str:
    shown = value.replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"


def _bold(verdict: str) -> str:
    return verdict if verdict in ("pass", "same", "better") else f"**{verdict}**"
