"""Distances between two sets of images, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dexport.errors import InputError

POOLED_SIDE = 8
PIXELS = f"Fréchet distance ({POOLED_SIDE}x{POOLED_SIDE} pixels)"
"""Its name in reports: over mean-pooled pixels, a rough measure that needs no network. It is not FID."""


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) float64 of features, and how many there were."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of (N, D) features, N at least 2; the covariance is the unbiased one."""
        features = features.astype(np.float64)
        if len(features) < 2 or not np.isfinite(features).all():
            raise InputError(
                f"{len(features)} feature rows, {int((~np.isfinite(features)).any(axis=1).sum())} of them not finite",
                hint="give two images or more, without NaN",
            )
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., arXiv 1706.08500).

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: no complex rounding.
    """
    root = _root(a.covariance)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def pooled_pixels(images: np.ndarray) -> np.ndarray:
    """Features (N, 64 C) in [0, 1] of uint8 images (N, H, W, C): means over an 8x8 grid of cells."""
    count, height, width, channels = images.shape
    if height % POOLED_SIDE or width % POOLED_SIDE:
        raise InputError(f"{height}x{width} images", hint=f"both sides must be multiples of {POOLED_SIDE}")
    cells = images.reshape(count, POOLED_SIDE, height // POOLED_SIDE, POOLED_SIDE, width // POOLED_SIDE, channels)
    return cells.mean(axis=(2, 4), dtype=np.float64).reshape(count, -1) / 255


def load_images(path: Path) -> np.ndarray:
    """Images (N, H, W, C) uint8 of an ``.npz`` file with ``arr_0``, the layout of ADM's sample files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{path} holds no images: {error}", hint="give an .npz with arr_0 (N, H, W, C) uint8"
        ) from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}", hint="give (N, H, W, C) uint8")
    return images


def _root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
