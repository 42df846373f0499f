"""The Fréchet distance of two Gaussians, which over Inception features is FID."""

from __future__ import annotations

import numpy as np

from dexport.validate.distances.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., arXiv 1706.08500).

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: no complex rounding.
    """
    root = root(a.covariance)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
