"""The report as one page that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dexport.printable import printable_values
from dexport.validate.report.parity_table import gate_text, word
from dexport.validate.report.views import charts, text
from dexport.verdict import relative_l2_of

TEMPLATE = "report.html"
ORDER = ("float32", "float16", "bfloat16")
STEPS_HEAT = 100
PICTURES = ("pytorch", "bundle", "difference")
PNG = "data:image/png;base64,"


def html(report: Mapping[str, Any]) -> str:
    """The page."""
    report = printable_values(report)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "count": "{:,}".format, "megabytes": _megabytes, "figure": text.figure}
    environment.filters["gate"] = gate_text
    return environment.get_template(TEMPLATE).render(
        r=report,
        text=text,
        word=word,
        curves=_curves(report["trajectory"]),
        intervals=_intervals(report),
        heat=_heat(report["blocks"]),
        histograms=_histograms(report),
        pairs=_pairs(report),
        bars=_bars(report["precision_map"]),
    )


def _curves(trajectory: Mapping[str, Any] | None) -> Any:
    if trajectory is None:
        return ""
    steps = {state["t"]: index for index, state in enumerate(trajectory["states"], start=1)}
    states = [(index, at["relative_l2"]) for index, at in enumerate(trajectory["states"], start=1)]
    evaluations = [(steps[at["t"]], at["relative_l2"]) for at in trajectory["evaluations"] if at["t"] in steps]
    series = {"state, two free runs": states, "evaluation, at PyTorch's states": evaluations}
    limit = None if trajectory.get("tokens") else relative_l2_of(trajectory["gate_snr_db"])
    return charts.curves(series, "step", limit)


def _intervals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The distances of a distribution, with the limit where there is a gate."""
    found = report["distribution"]
    if found is None:
        return []
    limits = {gate["metric"]: gate["limit"] for gate in report["gates"]}
    rows = []
    for title, name, metrics in (
        (found["distance"], "delta", ("fid_delta", "frechet_delta")),
        (found["kernel_distance"], "kernel_delta", ("kid_delta", "kernel_delta")),
    ):
        delta = found[name]
        if delta is None:
            continue
        limit = next((limits[metric] for metric in metrics if metric in limits), None)
        chart = charts.interval(delta["delta"], delta["low"], delta["high"], limit, f"paired delta of the {title}")
        rows.append({**delta, "title": title, "metric": metrics[1], "chart": chart})
    return rows


def _heat(blocks: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Shades of errors, 0 to 100 over their decades."""
    if not blocks:
        return []
    columns = ("own", "propagated", "expected")
    values = [row[name] for row in blocks for name in columns if row.get(name)]
    low, high = (math.log10(edge) for edge in (min(values), max(values))) if values else (0.0, 1.0)

    def shade(value: float | None) -> int:
        if value is None:
            return STEPS_HEAT
        if not value:
            return 0
        return round(STEPS_HEAT * (math.log10(value) - low) / (high - low)) if high > low else STEPS_HEAT // 2

    return [
        {
            "path": row["path"] or "(outside of blocks)",
            "cells": [_cell(row, name, shade) for name in columns],
            "failed": row.get("passed") is False,
        }
        for row in blocks
    ]


def _cell(row: Mapping[str, Any], name: str, shade: Callable[[float | None], int]) -> dict[str, Any]:
    """An error that is not finite is the worst there is; what a precision explains may be not known."""
    value = row.get(name)
    if value is None and name == "expected":
        return {"text": "-", "shade": 0}
    return {"text": _number(value, 1), "shade": shade(value)}


def _histograms(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for level in ("trajectory", "distribution"):
        for histogram in (report[level] or {}).get("histograms", ()):
            if level == "trajectory" and report["distribution"] and histogram["title"] == "pixels":
                continue  # the distribution has more of them
            edges, counts = histogram["edges"], histogram["counts"]
            total, most = sum(counts) or 1, max(counts) or 1
            rows = [
                {"label": _bin(histogram["unit"], edges[i], edges[i + 1]), "share": n / total, "width": 100 * n / most}
                for i, n in enumerate(counts)
            ]
            kept = [i for i, n in enumerate(counts) if n]
            rows = rows[kept[0] : kept[-1] + 1] if kept else []
            found.append({"title": f"{level}: {histogram['title']}", "unit": histogram["unit"], "rows": rows})
    return found


def _bin(unit: str, low: float, high: float) -> str:
    if unit.startswith("log10"):
        return f"1e{low:g}" if low == int(low) else f"3e{math.floor(low):d}"
    return f"{low:g}" if high - low == 1 else f"{low:g}-{high - 1:g}"


def _pairs(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the distribution where there is one: it has more pictures to find the worst of."""
    for level in ("distribution", "trajectory"):
        pairs = (report[level] or {}).get("pairs")
        if pairs:
            return [{**pair, **{name: _inline(pair[name]) for name in PICTURES}} for pair in pairs]
    return []


def _inline(source: str) -> str:
    """A picture inside the page; anything else would make the reader's browser ask a stranger for it."""
    return source if source.startswith(PNG) else PNG


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    bars = []
    for row in rows:
        total = sum(row["nodes"].values()) or 1
        names = sorted(row["nodes"], key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
        parts = [
            {"dtype": name, "nodes": row["nodes"][name], "width": 100 * row["nodes"][name] / total} for name in names
        ]
        bars.append({"block": "/".join(filter(None, (row["part"], row["block"]))), "parts": parts, "row": row})
    return bars


def _number(value: float | None, digits: int = 2) -> str:
    return "not finite" if value is None else f"{value:.{digits}e}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.2f} MB"
