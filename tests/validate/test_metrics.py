"""Metrics against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dexport.validate.metrics import compare

ARRAYS = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e3, 1e3, width=32))


@given(ARRAYS)
def test_an_array_equals_itself(array: np.ndarray) -> None:
    metrics = compare(array, array)
    assert metrics.finite
    assert (metrics.max_abs, metrics.relative_l2) == (0.0, 0.0)
    assert metrics.snr_db == math.inf
    assert metrics.cosine == pytest.approx(1.0)


@given(ARRAYS.filter(lambda a: np.abs(a).max() > 1e-3), st.floats(1e-6, 0.5))
def test_scaling_by_one_plus_e_is_an_error_of_e(array: np.ndarray, e: float) -> None:
    metrics = compare(array.astype(np.float64), array.astype(np.float64) * (1 + e))
    assert metrics.relative_l2 == pytest.approx(e, rel=1e-6)
    assert metrics.snr_db == pytest.approx(-20 * math.log10(e), abs=1e-4)
    assert metrics.max_abs == pytest.approx(e * float(np.abs(array).max()), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_never_close(bad: float) -> None:
    metrics = compare(np.ones(3), np.array([1.0, bad, 1.0]))
    assert not metrics.finite
    assert metrics.relative_l2 == math.inf


def test_an_output_where_nothing_is_expected_is_an_infinite_error() -> None:
    assert compare(np.zeros(3), np.ones(3)).relative_l2 == math.inf
    assert compare(np.zeros(3), np.zeros(3)).relative_l2 == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shape"):
        compare(np.zeros(3), np.zeros(4))


@pytest.mark.parametrize(("got", "share"), [([7, 7, 7, 7], 1.0), ([7, 7, 9000, 7], 0.75), ([1, 2, 3, 4], 0.0)])
def test_whole_numbers_are_names(got: list[int], share: float) -> None:
    """A code is not nearer to another because its number is."""
    metrics = compare(np.array([7, 7, 7, 7]), np.array(got))
    one_hot = [np.eye(9001)[numbers] for numbers in ([7, 7, 7, 7], got)]
    expected = compare(*one_hot)
    assert metrics.cosine == expected.cosine == share
    assert metrics.relative_l2 == pytest.approx(expected.relative_l2)
    assert metrics.max_abs == expected.max_abs
    assert metrics.snr_db == pytest.approx(expected.snr_db)
