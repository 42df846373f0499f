"""How much farther from real images a runtime's images are than PyTorch's from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dexport.errors import InputError
from dexport.validate.distances.frechet import root
from dexport.validate.distances.kernels import blocks, cubic
from dexport.validate.distances.moments import Moments

Reference = TypeVar("Reference")
Statistic = Callable[[np.ndarray, Reference], Callable[[np.ndarray], float]]
"""(features (N, D), reference) -> a function of row indices, which may repeat: the distance of those rows.

What does not depend on the rows is computed once, before the bootstrap.
"""


@dataclass(frozen=True)
class PairedDelta:
    """A difference of two distances to the same reference.

    Attributes:
        a, b: the two distances over all pairs.
        delta: a - b.
        low, high: percentile interval of the delta over bootstrap samples of the pairs.
        confidence: of that interval.
        count: pairs.
        bootstrap, seed: samples, and the seed that drew them.
    """

    a: float
    b: float
    delta: float
    low: float
    high: float
    confidence: float
    count: int
    bootstrap: int
    seed: int


def paired_delta(
    features_a: np.ndarray,
    features_b: np.ndarray,
    reference: Reference,
    statistic: Statistic[Reference],
    *,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDelta:
    """Distance of ``a`` minus distance of ``b``, with an interval.

    Pairs are drawn together, so what the two share (the noise, the small-sample bias, the bias of drawing twice)
    cancels in the difference: it is known far better than either distance.

    Args:
        features_a, features_b: (N, D) each; row i of both comes from the same noise.
        reference: what the statistic compares with: :class:`Moments` for :func:`frechet_to`, real features (M, D) for
            :func:`kernel_to`.

    Raises:
        InputError: sets that are not paired, or too small.
    """
    if features_a.shape != features_b.shape or len(features_a) < 2:
        raise InputError(
            f"features {list(features_a.shape)} and {list(features_b.shape)} are not pairs",
            hint="sample both with the same labels and noise, two images or more",
        )
    count = len(features_a)
    of_a, of_b = statistic(features_a, reference), statistic(features_b, reference)
    everything = np.arange(count)
    a, b = of_a(everything), of_b(everything)
    rng = np.random.default_rng(seed)
    deltas = []
    for _ in range(bootstrap):
        rows = rng.integers(count, size=count)
        deltas.append(of_a(rows) - of_b(rows))
    tail = (1 - confidence) / 2
    low, high = np.quantile(deltas, (tail, 1 - tail))
    return PairedDelta(a, b, a - b, float(low), float(high), confidence, count, bootstrap, seed)


def frechet_to(features: np.ndarray, reference: Moments) -> Callable[[np.ndarray], float]:
    """The Fréchet distance of rows to a reference.

    With fewer rows N than dimensions D the shared term comes from N x N Gram matrices, which have the same eigenvalues
    as the D x D product apart from zeros and need no new product for each drawing of rows.
    """
    features = features.astype(np.float64)
    few = len(features) <= features.shape[1]
    own_root = None if few else root(reference.covariance)
    gram = features @ reference.covariance @ features.T if few else None
    spread = np.trace(reference.covariance)

    def distance(rows: np.ndarray) -> float:
        chosen = features[rows]
        mean = chosen.mean(axis=0)
        centred = chosen - mean
        if gram is not None:
            inner = gram[np.ix_(rows, rows)]
            shared = inner - inner.mean(axis=0) - inner.mean(axis=1, keepdims=True) + inner.mean()
        else:
            projected = centred @ own_root
            shared = projected.T @ projected
        eigenvalues = np.clip(np.linalg.eigvalsh(shared), 0, None) / (len(rows) - 1)
        gap = mean - reference.mean
        own = (centred**2).sum() / (len(rows) - 1)
        return float(gap @ gap + own + spread - 2 * np.sqrt(eigenvalues).sum())

    return distance


def kernel_to(features: np.ndarray, reference: np.ndarray) -> Callable[[np.ndarray], float]:
    """The unbiased MMD² of KID between rows and all reference features (M, D); a row drawn twice makes no pair."""
    features, reference = features.astype(np.float64), reference.astype(np.float64)
    kernel = cubic(features, features)
    np.fill_diagonal(kernel, 0)
    count = len(reference)
    across, of_reference = np.zeros(len(features)), 0.0
    for some in (reference[rows] for rows in blocks(count)):
        across += cubic(features, some).sum(axis=1) / count
        of_reference += cubic(some, reference).sum()
    with_itself = (((reference**2).sum(axis=1) / reference.shape[1] + 1) ** 3).sum()
    constant = (of_reference - with_itself) / (count * (count - 1))

    def distance(rows: np.ndarray) -> float:
        weights = np.bincount(rows, minlength=len(features)).astype(np.float64)
        pairs = weights.sum() ** 2 - (weights**2).sum()
        return float(weights @ kernel @ weights / pairs + constant - 2 * across[rows].mean())

    return distance
