"""Reading golden files: weights, inputs and outputs that the official code produced."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from dexport.validate.metrics import compare

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 4e-5
"""Of ``relative_error`` in float32: four times what another processor may round otherwise, a quarter of the smallest
planted fault (tests/graphs/test_planted.py). Most of the former is one bit in the frequencies of time."""
TOLERANCE_FLOAT64 = 5e-6
"""Of the same in float64, where only the rounding of the official code is left: enough to see another epsilon."""
TOLERANCE_LOOP = 1e-5
"""Of the same where the golden is the end of a loop: a quarter of the error of the network is left in it."""


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    metadata: dict[str, str]


def load_golden(name: str) -> Golden:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        metadata = file.metadata()

    def group(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Golden(
        json.loads(metadata["config"]), group("weights/"), group("inputs/"), group("outputs/"), dict(metadata)
    )


def load_keys(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDENS / "keys" / f"{name}.json").read_text())


def relative_error(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """How far ``actual`` is from ``expected``, relative to the size of ``expected``.

    The larger one of two: the L2 norm of the difference to that of ``expected``, which sees what is wrong everywhere,
    and the largest difference to the largest value, which sees what is wrong in one place.
    """
    reference = np.asarray(expected)
    metrics = compare(reference, np.asarray(actual))
    largest = float(np.abs(reference).max())
    return max(metrics.relative_l2, metrics.max_abs / largest if metrics.max_abs else 0.0)


def assert_golden(
    actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = TOLERANCE
) -> None:
    """``actual`` is ``expected`` but for rounding, whatever the scale of the two; the shape is the same."""
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= tolerance
