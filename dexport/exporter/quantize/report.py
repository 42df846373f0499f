"""What a calibration decided, as JSON: thresholds per layer, and ranges over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dexport.exporter.quantize.calibrate import Calibration
from dexport.exporter.quantize.observer import METHODS, LayerStatistics, Statistics, TensorStatistics
from dexport.exporter.quantize.plan import SMOOTHED
from dexport.exporter.quantize.rounded import RoundedWeights
from dexport.exporter.quantize.schemes import LOW_BITS
from dexport.exporter.quantize.smooth import migration, smooth_threshold


def calibration_report(settings: Calibration, statistics: Statistics, schemes: Mapping[str, str]) -> dict[str, Any]:
    """The settings, and for every layer its scheme, its thresholds by each method and its range at each time.

    ``smoothed threshold`` is that of the input after SmoothQuant; all else is of the input before.

    ``drift`` is the largest magnitude at the time where it is largest over that where it is smallest: a static scale
    wastes that much of its codes at the quietest time.
    """
    return {
        "settings": asdict(settings),
        "layers": {path: _layer(seen, schemes[path], settings.method) for path, seen in statistics.items()},
    }


def rounding_report(settings: Calibration, rounded: RoundedWeights, schemes: Mapping[str, str]) -> dict[str, Any]:
    """For every layer in INT4 or ternary the relative L2 error of its output on the calibration; ``nearest`` is that of
    rounding every value to its nearest code."""
    layers = {
        path: {"scheme": scheme, **rounded.errors(path, scheme)}
        for path, scheme in schemes.items()
        if scheme in LOW_BITS
    }
    return {"settings": asdict(settings), "layers": layers}


def _layer(seen: LayerStatistics, scheme: str, method: str) -> dict[str, Any]:
    layer: dict[str, Any] = {"scheme": scheme, "input": _tensor(seen.input, method)}
    if scheme == SMOOTHED:
        layer["smoothed threshold"] = smooth_threshold(seen, migration(seen))
    if seen.output.ranges:
        layer["output"] = _tensor(seen.output, method)
    return layer


def _tensor(seen: TensorStatistics, method: str) -> dict[str, Any]:
    times = sorted(seen.ranges, reverse=True)
    loudest = [max(map(abs, seen.ranges[time])) for time in times]
    threshold = seen.threshold(method)
    return {
        "threshold": threshold,
        "thresholds": {name: seen.threshold(name) for name in METHODS},
        "clipped": seen.clipped(threshold),
        "drift": max(loudest) / min(loudest) if min(loudest) > 0 else None,
        "ranges": [{"t": time, "low": seen.ranges[time][0], "high": seen.ranges[time][1]} for time in times],
    }
