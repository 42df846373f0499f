"""The difference of two distances: exact where it can be, an interval that holds, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from dexport.errors import InputError
from dexport.validate.distances import (
    Moments,
    frechet_distance,
    frechet_to,
    kernel_distance,
    kernel_to,
    paired_delta,
)

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((400, 6)) @ RNG.standard_normal((6, 6))
FAKE = REAL[:120] * 1.2 + 0.3
WORSE = FAKE + 0.1 + 0.01 * RNG.standard_normal(FAKE.shape)


@pytest.mark.parametrize("count", [5, 120])
def test_distance_of_all_rows_is_the_distance(count: int) -> None:
    """Five rows in six dimensions go through Gram matrices, more through covariances."""
    everything = np.arange(count)
    frechet = frechet_to(FAKE[:count], Moments.of(REAL))(everything)
    assert frechet == pytest.approx(frechet_distance(Moments.of(FAKE[:count]), Moments.of(REAL)), rel=1e-6)
    kernel = kernel_to(FAKE[:count], REAL[:count])(everything)
    assert kernel == pytest.approx(kernel_distance(FAKE[:count], REAL[:count])[0], rel=1e-9)


@pytest.mark.parametrize("count", [5, 120])
def test_distance_of_drawn_rows_is_that_of_the_repeated_features(count: int) -> None:
    rows = np.random.default_rng(1).integers(count, size=count)
    drawn = frechet_to(FAKE[:count], Moments.of(REAL))(rows)
    assert drawn == pytest.approx(frechet_distance(Moments.of(FAKE[rows]), Moments.of(REAL)), rel=1e-6)


def test_a_row_drawn_twice_is_no_pair() -> None:
    rows = np.array([0, 1, 2, 2])
    with_repeat = kernel_to(FAKE[:3], REAL)(rows)
    among = (FAKE[:3] @ FAKE[:3].T / 6 + 1) ** 3
    weighted = among[0, 1] + 2 * among[0, 2] + 2 * among[1, 2]
    across = ((FAKE[rows] @ REAL.T / 6 + 1) ** 3).mean()
    real = (REAL @ REAL.T / 6 + 1) ** 3
    constant = (real.sum() - np.trace(real)) / (400 * 399)
    assert with_repeat == pytest.approx(weighted / 5 + constant - 2 * across)


@pytest.mark.parametrize(("statistic", "reference"), [(frechet_to, Moments.of(REAL)), (kernel_to, REAL)])
def test_delta(statistic, reference) -> None:  # type: ignore[no-untyped-def]
    same = paired_delta(FAKE, FAKE, reference, statistic, bootstrap=5)
    assert (same.delta, same.low, same.high) == (0, 0, 0)
    result = paired_delta(WORSE, FAKE, reference, statistic, bootstrap=100, seed=3)
    assert result.delta == result.a - result.b > 0
    assert result.low < result.delta < result.high
    assert (result.count, result.bootstrap, result.seed, result.confidence) == (120, 100, 3, 0.95)
    assert result == paired_delta(WORSE, FAKE, reference, statistic, bootstrap=100, seed=3)


def test_pairing_narrows_the_interval() -> None:
    reference = Moments.of(REAL)
    paired = paired_delta(WORSE, FAKE, reference, frechet_to, bootstrap=50)
    unpaired = paired_delta(WORSE[::-1], FAKE, reference, frechet_to, bootstrap=50)
    assert paired.low > 0
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


@pytest.mark.parametrize(("a", "b"), [(FAKE, FAKE[:-1]), (FAKE[:1], FAKE[:1]), (FAKE, REAL[:120, :5])])
def test_what_is_not_paired_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(InputError, match="not pairs"):
        paired_delta(a, b, Moments.of(REAL), frechet_to)
