"""Distances between a reference tensor and what was computed instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Errors of one output over all its elements.

    Attributes:
        max_abs: largest absolute difference.
        relative_l2: ||actual - reference|| / ||reference||.
        cosine: cosine similarity.
        snr_db: signal-to-noise ratio, -20 log10 of ``relative_l2``.
        finite: whether every value is finite, or infinite as in the reference; if not, the errors are NaN or infinite.
    """

    max_abs: float
    relative_l2: float
    cosine: float
    snr_db: float
    finite: bool


def compare(reference: np.ndarray, actual: np.ndarray) -> Metrics:
    """Metrics of ``actual`` against ``reference`` (same shape), in float64. Infinite values must be equal.

    An int64 is the name of something, such as a code, and no size: such arrays are compared as one-hot vectors, so that
    ``cosine`` is the share that is equal.
    """
    if reference.shape != actual.shape:
        raise ValueError(f"shape {actual.shape} differs from the reference's {reference.shape}")
    if reference.dtype == actual.dtype == np.int64:
        return _compare_names(int((reference != actual).sum()), reference.size)
    expected, got = reference.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    infinite = np.isinf(expected)
    if infinite.any() and np.array_equal(expected[infinite], got[infinite]):
        expected, got = expected[~infinite], got[~infinite]
    if not np.isfinite(got).all():
        return Metrics(math.inf, math.inf, math.nan, -math.inf, finite=False)
    noise, signal = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
    relative = noise / signal if signal else (0.0 if noise == 0 else math.inf)
    norms = signal * float(np.linalg.norm(got))
    return Metrics(
        max_abs=float(np.abs(got - expected).max(initial=0.0)),
        relative_l2=relative,
        cosine=float(expected @ got) / norms if norms else float(noise == 0),
        snr_db=math.inf if relative == 0 else -20 * math.log10(relative),
        finite=True,
    )


def _compare_names(different: int, count: int) -> Metrics:
    """Metrics of so many one-hot vectors, some of which differ."""
    share = different / count if count else 0.0
    return Metrics(
        max_abs=float(different > 0),
        relative_l2=math.sqrt(2 * share),
        cosine=1 - share,
        snr_db=-10 * math.log10(2 * share) if share else math.inf,
        finite=True,
    )


def plain(value: Any) -> Any:
    """JSON values, at any depth; a figure that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
