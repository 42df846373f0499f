"""Statistics, and the thresholds that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dexport.errors import InputError
from dexport.exporter.quantize.observer import BINS_PER_OCTAVE, METHODS, TensorStatistics

RNG = np.random.default_rng(0)


def seen(*tensors: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    for time, tensor in enumerate(tensors):
        statistics.observe(tensor.astype(np.float32), -1, float(time % 2))
    return statistics


def quantised(x: np.ndarray, threshold: float) -> np.ndarray:
    step = threshold / 127
    return np.clip(np.rint(x / step), -128, 127) * step


def test_order_and_batches_do_not_matter() -> None:
    a, b, c = (RNG.standard_normal((3, 4, 5)) * 10.0**n for n in range(3))
    one = seen(a, b, c).arrays()
    other = seen(c, b, a).arrays()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    again = TensorStatistics.of_arrays(one).arrays()
    assert all(np.array_equal(one[name], again[name]) for name in one)


def test_ranges_and_channels() -> None:
    statistics = seen(np.array([[1.0, -2.0]]), np.array([[-3.0, 0.5]]))
    assert statistics.ranges == {0.0: (-2.0, 1.0), 1.0: (-3.0, 0.5)}
    assert statistics.channel_absmax.tolist() == [3.0, 2.0]
    assert statistics.absmax == 3.0
    image = TensorStatistics()
    image.observe(RNG.standard_normal((2, 3, 4, 5), dtype=np.float32), 1, 0.0)
    assert image.channel_absmax.shape == (3,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match=r"1 of 4 values are NaN or infinite at time 0"):
        seen(np.array([1.0, bad, 2.0, 3.0]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-30, 30), st.sampled_from([2.0, 5.0, 30.0]))
def test_the_mse_threshold_is_no_worse_than_the_largest_value(seed: int, exponent: int, tail: float) -> None:
    x = np.random.default_rng(seed).standard_t(tail, 4000) * 2.0**exponent
    statistics = seen(x)
    errors = {m: np.mean((quantised(x, statistics.threshold(m)) - x) ** 2) for m in METHODS}
    assert errors["mse"] <= errors["absmax"] * 1.1  # it is chosen from a histogram
    assert 0 < statistics.threshold("mse") <= statistics.threshold("absmax")


def test_the_percentile_is_that_of_the_values() -> None:
    x = RNG.standard_normal(200_000)
    wanted = np.quantile(np.abs(x), 0.9999)
    assert wanted <= seen(x).threshold("percentile") <= wanted * (1 + 2 / BINS_PER_OCTAVE)
    assert seen(x).clipped(wanted) == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_the_threshold_zero(method: str) -> None:
    assert seen(np.zeros(4)).threshold(method) == 0
