"""Every distance against its definition, written down again in the plainest way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dexport.errors import InputError
from dexport.validate.distances import (
    Moments,
    RunningMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    rbf_distance,
)


def features(seed: int, count: int = 60, dim: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)) ** 2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.floats(-1e6, 1e6))
def test_moments_in_one_pass_are_those_of_the_whole(sizes: list[int], offset: float) -> None:
    whole = features(0, count=sum(sizes) + 2, dim=3) + offset
    running = RunningMoments()
    for part in np.split(whole, np.cumsum(sizes)):
        running.add(part)
    moments = running.moments()
    assert moments.count == len(whole)
    np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(whole, rowvar=False), rtol=1e-7)


def test_features_that_are_not_finite_are_refused_with_their_number() -> None:
    running = RunningMoments()
    running.add(features(0, count=7))
    bad = features(1, count=4)
    bad[2, 1] = np.nan
    with pytest.raises(InputError, match=r"of 1 of 4 images .* first of image 9"):
        running.add(bad)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_is_torch_fidelitys(seed: int) -> None:
    a, b = features(seed), features(seed + 10, count=80) * 1.5
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(axis=0) - b.mean(axis=0)
    root = np.sqrt(np.linalg.eigvals(sigma_a @ sigma_b).astype(complex)).real.sum()
    expected = gap @ gap + np.trace(sigma_a) + np.trace(sigma_b) - 2 * root
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-6)


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / len(x) + 1) ** 3


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    a, b = features(1, count=9), features(2, count=9)
    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = [np.mean([cubic(s[i], s[j]) for i, j in pairs if i != j]) for s in (a, b)]
    across = np.mean([cubic(a[i], b[j]) for i, j in pairs])
    assert kernel_distance(a, b) == (pytest.approx(sum(within) - 2 * across, rel=1e-9), 0.0)


def test_kernel_distance_over_subsets_is_near_the_whole() -> None:
    a, b = features(3, count=400), features(4, count=300)
    whole, _ = kernel_distance(a[:300], b)
    mean, deviation = kernel_distance(a, b, subsets=60, subset_size=100, seed=1)
    assert deviation > 0
    assert abs(mean - whole) < deviation
    assert (mean, deviation) == kernel_distance(a, b, subsets=60, subset_size=100, seed=1)


def test_kernel_distance_of_one_distribution_is_about_zero() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 500, 8))
    assert abs(kernel_distance(a, b)[0]) < 0.05
    assert kernel_distance(a, b + 1)[0] > 0.5


def test_rbf_distance_is_the_mean_over_all_pairs_of_directions() -> None:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features(5, count=5), features(6, count=4)))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([np.exp(-((p - q) ** 2).sum() / 18) for p in x for q in y]))

    assert rbf_distance(a, 7 * b, sigma=3) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), rel=1e-9)
    assert rbf_distance(a, 0 * a) > rbf_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_inception_score_is_its_definition() -> None:
    logits = np.random.default_rng(0).standard_normal((40, 7)) * 3
    p = torch.from_numpy(logits).softmax(1)
    expected = torch.nn.functional.kl_div(p.mean(0).log().expand_as(p), p, reduction="none").sum(1).mean().exp().item()
    assert inception_score(logits, splits=1) == (pytest.approx(expected, rel=1e-9), 0.0)
    assert inception_score(np.zeros((20, 5))) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(np.tile(np.eye(4) * 1e3, (50, 1)), splits=1)[0] == pytest.approx(4)


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_count_balls(seed: int) -> None:
    a, b = features(seed, count=30, dim=3), features(seed + 1, count=40, dim=3)

    def covered(points: np.ndarray, others: np.ndarray) -> float:
        reach = [sorted(np.linalg.norm(others - other, axis=1))[3] for other in others]
        return float(np.mean([(np.linalg.norm(others - point, axis=1) <= reach).any() for point in points]))

    assert precision_recall(a, b) == (covered(a, b), covered(b, a))
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, b + 1e6) == (0.0, 0.0)
