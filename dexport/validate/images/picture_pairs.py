"""Pairs of pictures for a report: PyTorch's, the bundle's, and what differs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dexport.runtime.gallery import to_pil
from dexport.validate.images.picture_metrics import PictureDistance, psnr, ssim

WORST = 4
"""Pairs that a report shows."""
LARGEST_GAIN = 64
LEVEL_EDGES = (0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 256)
"""Bins of the differences between pixels: 0, 1, 2, 3-4, 5-8, ..."""
DECADES = np.arange(-9, 1.5, 0.5)
"""Bins of log10 |error|: what is smaller or larger counts in the outermost ones."""


@dataclass(frozen=True)
class Pair:
    """One picture made twice from the same noise.

    Attributes:
        number: of its noise.
        psnr_db: None where both are equal.
        lpips: None where it is not measured.
        gain: the difference is shown this many times as large, around grey.
        pytorch, bundle, difference: PNG files as data URIs.
    """

    number: int
    label: str
    psnr_db: float | None
    ssim: float
    lpips: float | None
    gain: int
    pytorch: str
    bundle: str
    difference: str


@dataclass(frozen=True)
class Histogram:
    """Counts between ``edges`` (one more than there are counts)."""

    title: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Likeness:
    """How alike two sets of pictures are.

    Attributes:
        psnr_db: of every pair, infinite where both are equal.
        pairs: the ones that are least alike, the worst first.
        histogram: of the differences of all pixels.
    """

    psnr_db: tuple[float, ...]
    pairs: tuple[Pair, ...]
    histogram: Histogram


def compare_pictures(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], labels: Sequence[str], lpips: PictureDistance | None = None
) -> Likeness:
    """Compare pictures that come in batches of (PyTorch's, the bundle's), each uint8 (B, H, W, C).

    Args:
        lpips: measured for the pairs that are least alike.
    """
    scores: list[float] = []
    worst: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    counts = np.zeros(len(LEVEL_EDGES) - 1, np.int64)
    for pytorch, bundle in batches:
        for a, b in zip(pytorch, bundle, strict=True):
            worst.append((psnr(a, b), len(scores), a, b))
            scores.append(worst[-1][0])
        worst = sorted(worst, key=lambda entry: entry[:2])[:WORST]
        counts += np.histogram(np.abs(bundle.astype(np.int16) - pytorch), LEVEL_EDGES)[0]
    return Likeness(
        tuple(scores),
        tuple(_pair(a, b, labels[number], number, score, lpips) for score, number, a, b in worst),
        Histogram("pixels", "levels of 255", LEVEL_EDGES, tuple(map(int, counts))),
    )


def _pair(a: np.ndarray, b: np.ndarray, label: str, number: int, score: float, lpips: PictureDistance | None) -> Pair:
    difference = b.astype(np.int16) - a.astype(np.int16)
    largest = int(np.abs(difference).max())
    gain = max(1, min(LARGEST_GAIN, 127 // largest)) if largest else 1
    shown = np.clip(128 + gain * difference, 0, 255).astype(np.uint8)
    return Pair(
        number=number,
        label=label,
        psnr_db=score if math.isfinite(score) else None,
        ssim=ssim(a, b),
        lpips=None if lpips is None else float(lpips(a[None], b[None])[0]),
        gain=gain,
        pytorch=data_uri(a),
        bundle=data_uri(b),
        difference=data_uri(shown),
    )


def data_uri(image: np.ndarray) -> str:
    """(H, W, C) uint8 as a PNG file inside an address."""
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def error_histogram(title: str, reference: np.ndarray, actual: np.ndarray) -> Histogram:
    """Of log10 of |actual - reference| over the root mean square of the reference."""
    rms = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))) or 1.0
    error = np.abs(actual.astype(np.float64) - reference) / rms
    logarithms = np.log10(np.maximum(error, 1e-300))
    counts, _ = np.histogram(np.clip(logarithms, DECADES[0], DECADES[-1]), DECADES)
    return Histogram(title, "log10 of |error| / RMS", tuple(DECADES.tolist()), tuple(map(int, counts)))
