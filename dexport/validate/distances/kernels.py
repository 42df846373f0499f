"""Maximum mean discrepancies: distances that stay unbiased where there are few images."""

from __future__ import annotations

import numpy as np

ROWS_AT_ONCE = 1000
"""Of a matrix of all pairs, to bound memory."""


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased MMD² with kernel (x·y / D + 1)³.

    Over Inception features this is KID (Bińkowski et al., arXiv 1801.01401).

    Args:
        a, b: (N, D) and (M, D).
        subset_size: at most N and M. Where it covers both whole sets, there is one subset and no deviation.
    """
    size = min(subset_size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1
    rng = np.random.default_rng(seed)
    values = [
        _unbiased(
            a[rng.choice(len(a), size, replace=False)].astype(np.float64),
            b[rng.choice(len(b), size, replace=False)].astype(np.float64),
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def rbf_distance(a: np.ndarray, b: np.ndarray, sigma: float = 10.0) -> float:
    """MMD² with kernel exp(-|x - y|² / 2 sigma²), diagonals included, of features brought to unit length.

    Over CLIP embeddings and times 1000 this is CMMD (Jayasumana et al., arXiv 2401.09603).
    """
    a, b = _unit_length(a), _unit_length(b)
    return _rbf_mean(a, a, sigma) + _rbf_mean(b, b, sigma) - 2 * _rbf_mean(a, b, sigma)


def cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The kernel of KID between all rows: (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def blocks(count: int) -> list[slice]:
    """Slices of ``ROWS_AT_ONCE`` rows that cover ``count``."""
    return [slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE)]


def _unbiased(a: np.ndarray, b: np.ndarray) -> float:
    return _mean_of_pairs(cubic(a, a)) + _mean_of_pairs(cubic(b, b)) - 2 * float(cubic(a, b).mean())


def _mean_of_pairs(kernel: np.ndarray) -> float:
    """Without the diagonal, which compares images with themselves."""
    return float(kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))


def _unit_length(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _rbf_mean(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    total = sum(float(np.exp(-squared_distances(a[rows], b) / (2 * sigma**2)).sum()) for rows in blocks(len(a)))
    return total / (len(a) * len(b))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|x - y|² (N, M) between all rows."""
    return np.clip((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0, None)
