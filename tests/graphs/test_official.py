"""The networks against the official code: same weights, same inputs, same outputs."""

from __future__ import annotations

import pytest

from tests.golden import TOLERANCE_FLOAT64, assert_golden
from tests.graphs.official import NETWORKS, in_float64, official_network, official_pairs

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_official_ones(name: str) -> None:
    for got, wanted in official_pairs(name, official_network(name)):
        assert got.dtype == wanted.dtype
        assert_golden(got, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64_only_the_official_rounding_is_left(name: str) -> None:
    for got, wanted in official_pairs(name, in_float64(official_network(name))):
        assert_golden(got, wanted, TOLERANCE_FLOAT64)
