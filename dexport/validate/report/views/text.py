"""Figures as text, the same in every view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dexport.verdict import ACCEPT, LOSSY, Loss, lossy_text

DECIBELS = ("snr", "psnr")
KERNEL = ("kid_delta", "kernel_delta")


def figure(metric: str, value: float | None) -> str:
    """A metric's value, in the number of digits that it deserves."""
    if value is None:
        return "not finite"
    if metric in DECIBELS or metric.endswith("psnr_db"):
        return f"{value:.1f} dB"
    if metric in KERNEL or metric.endswith("kernel_delta"):
        return f"{value:+.2e}"
    if metric.endswith("delta"):
        return f"{value:+.4f}"
    if metric.startswith("speedup"):
        return f"{value:.2f}x"
    if metric == "wall_ms":
        return f"{value:.1f} ms"
    if metric.endswith("onnx_bytes"):
        return f"{value / 1e6:,.2f} MB"
    if metric in ("ssim", "cosine", "lpips") or metric.endswith(("ssim", "lpips")):
        return f"{value:.6f}"
    return f"{value:.2e}"


def value_of(gate: Mapping[str, Any]) -> str:
    """A gate's value with its interval."""
    if gate["value"] is None:
        return "equal" if gate["verdict"] == "pass" else "not finite"
    shown = figure(gate["metric"], gate["value"])
    if gate["low"] is None:
        return shown
    return f"{shown} [{figure(gate['metric'], gate['low'])}, {figure(gate['metric'], gate['high'])}]"


def limit_of(gate: Mapping[str, Any]) -> str:
    """A gate's limit with its direction."""
    if gate["limit"] is None:
        return "none"
    sign = "≤" if gate["better"] == "lower" else "≥"
    return f"{sign} {figure(gate['metric'], gate['limit'])}"


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence."""
    gates = report["gates"]
    passed = sum(gate["verdict"] == "pass" for gate in gates)
    lossy = sum(gate["verdict"] == LOSSY for gate in gates)
    worse = [change for change in (report["baseline"] or {}).get("changes", ()) if change["verdict"] == "worse"]
    text = f"{passed} of {len(gates)} gates passed"
    if lossy:
        text += f", {lossy} {'are' if lossy > 1 else 'is'} lossy"
    if report["baseline"] is not None:
        count = f"{len(worse)} figure{'s' * (len(worse) > 1)}" if worse else "no figure"
        text += f", {count} fell behind the baseline"
    return text


def lost(report: Mapping[str, Any]) -> str:
    """What was lost, as far as it was measured; of a lossy report also where the line is, and whether it was accepted.

    Empty where nothing was measured.
    """
    loss = Loss.of_json(report["loss"])
    if report["verdict"] != LOSSY:
        return str(loss)
    return f"{lossy_text(loss)}; {'accepted' if report['loss']['accepted'] is True else 'not accepted'} ({ACCEPT})"


def precision(report: Mapping[str, Any]) -> str:
    """Of all networks, each once."""
    return "; ".join(dict.fromkeys(network["precision"] for network in report["network"].values()))


def weights(report: Mapping[str, Any]) -> str:
    """Where the weights are from; random ones are told."""
    if report["bundle"]["random"]:
        return "RANDOM weights, not a trained model"
    return ", ".join(entry["path"] for entry in report["bundle"]["weights"].values())


def settings(report: Mapping[str, Any]) -> str:
    """How it was sampled."""
    if report["trajectory"] is not None:
        source = report["trajectory"]
        return f"{source['run']}, seed {source['seed']}"
    if report["distribution"] is not None:
        source = report["distribution"]
        return f"{source['run']}, seed {source['seed']}"
    return "nothing was sampled"


def changed_tools(report: Mapping[str, Any]) -> Iterator[str]:
    """Tools whose versions are not those of the baseline."""
    for name, (before, now) in (report["baseline"] or {}).get("tools", {}).items():
        yield f"{name} {before or 'none'} → {now or 'none'}"
