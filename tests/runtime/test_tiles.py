"""Tiles cover a side with few pieces of one size, and their weights are a partition of one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dexport.runtime.tiles import Tiles


@st.composite
def tilings(draw: st.DrawFn) -> Tiles:
    size = draw(st.integers(1, 24))
    return Tiles(draw(st.integers(size, 6 * size)), size, draw(st.integers(0, size - 1)))


@given(tilings())
def test_tiles_lie_inside_cover_the_side_and_overlap_enough(tiles: Tiles) -> None:
    places = [tiles.slice(index) for index in range(len(tiles))]
    assert places[0].start == 0
    assert places[-1].stop == tiles.side
    assert all(place.stop - place.start == tiles.size for place in places)
    assert all(a.stop - b.start >= tiles.overlap for a, b in itertools.pairwise(places))


@given(tilings())
def test_one_tile_less_would_not_do(tiles: Tiles) -> None:
    fewer = len(tiles) - 1
    assert fewer * tiles.size - (fewer - 1) * tiles.overlap < tiles.side or fewer == 0


@given(tilings(), st.integers(1, 8))
def test_weights_add_up_to_one_and_are_never_negative(tiles: Tiles, factor: int) -> None:
    total = np.zeros(tiles.side * factor)
    for index in range(len(tiles)):
        weights = tiles.weights(index, factor)
        assert weights.min() >= 0
        total[tiles.slice(index, factor)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(tilings(), st.integers(1, 8))
def test_a_quarter_of_the_overlap_does_not_count(tiles: Tiles, factor: int) -> None:
    margin = tiles.overlap * factor // 4
    for index in range(len(tiles)):
        weights = tiles.weights(index, factor)
        assert index == 0 or not weights[:margin].any()
        assert index == len(tiles) - 1 or not weights[len(weights) - margin :].any()


def test_the_blend_is_linear_over_half_the_overlap() -> None:
    tiles = Tiles(side=24, size=16, overlap=8)
    assert tiles.weights(0, 1)[8:].tolist() == [1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0]
    assert tiles.weights(1, 1)[:8].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]


@pytest.mark.parametrize("side", [7, 12])
def test_a_side_of_one_tile_is_that_tile(side: int) -> None:
    tiles = Tiles(side, side, 3)
    assert len(tiles) == 1
    assert tiles.slice(0, 2) == slice(0, 2 * side)
    assert tiles.weights(0, 2).tolist() == [1] * 2 * side
