"""How much each layer, stored in each scheme, moves the predictions when all others stay as they are."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dexport.errors import InputError
from dexport.exporter.quantize.calibrate import OnProgress
from dexport.exporter.quantize.simulate import Simulation, relative_error
from dexport.files import write_whole

Sensitivity = Mapping[str, Mapping[str, float]]
"""Module path -> scheme -> squared relative error of the guided prediction, the mean over states of a trajectory."""


def measure_sensitivity(
    simulation: Simulation, candidates: Mapping[str, Sequence[str]], key: str, file: Path, on_progress: OnProgress
) -> Sensitivity:
    """Measure every layer in every scheme.

    Args:
        candidates: schemes of every layer, besides floating point.
        key: what the figures depend on.
        file: where the figures so far are kept; a run that finds those of the same key goes on from there. The caller
            removes it.
    """
    measured = _resume(file, key)
    missing = [path for path, schemes in candidates.items() if not set(schemes) <= measured.get(path, {}).keys()]
    if not missing:
        return measured
    states = simulation.states()
    wanted = simulation.predictions(states)
    for path in missing:
        on_progress(len(candidates) - len(missing) + missing.index(path), len(candidates), path)
        measured[path] = {}
        for scheme in candidates[path]:
            with simulation.storing({path: scheme}):
                errors = map(relative_error, wanted, simulation.predictions(states))
                measured[path][scheme] = sum(errors) / len(states)
        _save(file, key, measured)
    return measured


def _resume(file: Path, key: str) -> dict[str, dict[str, float]]:
    if not file.exists():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["key"] != key:
            return {}
        return {
            path: {scheme: math.inf if error is None else error for scheme, error in errors.items()}
            for path, errors in document["errors"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} holds no sensitivities: {error}", hint=f"remove it: rm {shlex.quote(str(file))}"
        ) from error


def _save(file: Path, key: str, errors: Sensitivity) -> None:
    write_whole(file, json.dumps({"key": key, "errors": as_json(errors)}, allow_nan=False))


def as_json(sensitivity: Sensitivity) -> dict[str, dict[str, float | None]]:
    """JSON values: an error that is not finite, which JSON has no number for, becomes null."""
    return {
        path: {scheme: error if math.isfinite(error) else None for scheme, error in errors.items()}
        for path, errors in sensitivity.items()
    }
