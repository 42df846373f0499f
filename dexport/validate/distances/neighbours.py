"""Precision and recall of a set of images against a real one."""

from __future__ import annotations

import numpy as np

from dexport.validate.distances.kernels import blocks, squared_distances


def precision_recall(images: np.ndarray, real: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Share of images that lie among the real ones, and share of real ones among the images.

    A point lies among others when it is within the distance of one of them to its own ``neighbours``-th neighbour
    (Kynkäänniemi et al., arXiv 1904.06991).

    Args:
        images, real: features (N, D) and (M, D), each with more rows than ``neighbours``.
    """
    images, real = images.astype(np.float64), real.astype(np.float64)
    return _covered(images, real, neighbours), _covered(real, images, neighbours)


def _covered(points: np.ndarray, others: np.ndarray, neighbours: int) -> float:
    reach = np.concatenate(
        [
            # The nearest of all is the point itself.
            np.partition(squared_distances(others[rows], others), neighbours, axis=1)[:, neighbours]
            for rows in blocks(len(others))
        ]
    )
    hits = sum(
        int((squared_distances(points[rows], others) <= reach).any(axis=1).sum()) for rows in blocks(len(points))
    )
    return hits / len(points)
