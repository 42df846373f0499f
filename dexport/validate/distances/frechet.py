"""The Fréchet distance of two Gaussians, which over Inception features is FID."""

from __future__ import annotations

import numpy as np

from dexport.errors import InputError
from dexport.validate.distances.moments import Moments

ROUNDING = 1e-3
"""Of eigenvalues, as a share of the largest: what storing a covariance in float32 can do."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., arXiv 1706.08500).

    The trace of the root is the sum of the singular values of A^(1/2) B^(1/2). Eigenvalues of A B give the same, but
    with fewer images than features many of them are rounding noise, whose roots add up.
    """
    shared = np.linalg.svd(root(a.covariance) @ root(b.covariance), compute_uv=False).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite matrix; eigenvalues that are rounding noise count as zero.

    Raises:
        InputError: a negative eigenvalue that rounding does not explain: no set of features has such a covariance.
    """
    values, vectors = np.linalg.eigh(matrix)
    if values[0] < -ROUNDING * max(abs(values[-1]), abs(values[0])):
        raise InputError(
            f"a covariance has the eigenvalue {values[0]:.3g}, and none has negative ones",
            hint="make the statistics (mu, sigma) again",
        )
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0
    return (vectors * np.sqrt(values)) @ vectors.T
