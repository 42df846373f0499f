"""Error-compensated rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dexport.exporter.quantize.gptq import (
    INT4_LEVELS,
    Rounded,
    int4_block,
    nearest_int4,
    nearest_ternary,
    output_error,
    round_int4,
    round_ternary,
)

few = settings(max_examples=15, deadline=None, derandomize=True)
SHAPES = st.tuples(st.integers(1, 24), st.integers(2, 70))


def problem(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that lie near a plane of half the dimensions."""
    generator = torch.Generator().manual_seed(seed)
    inside = max(columns // 2, 1)
    mixing = torch.randn(inside, columns, generator=generator)
    x = torch.randn(4 * columns, inside, generator=generator) @ mixing
    x += 0.1 * torch.randn(x.shape, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x


def error(weight: Tensor, rounded: Rounded, hessian: Tensor) -> float:
    return float(output_error(weight, rounded.weight(), hessian).sum())


@given(st.integers(0, 2**31), SHAPES)
@few
def test_no_channel_is_worse_than_with_the_nearest_codes(seed: int, shape: tuple[int, int]) -> None:
    weight, hessian = problem(seed, *shape)
    for rounding, nearest, levels in (
        (round_int4, nearest_int4, INT4_LEVELS),
        (round_ternary, nearest_ternary, 1),
    ):
        got = rounding(weight, hessian)
        assert got.codes.dtype == torch.int8
        assert got.codes.abs().max() <= levels
        assert (got.scales > 0).all()
        plain = output_error(weight, nearest(weight, hessian.diagonal()).weight(), hessian)
        assert (output_error(weight, got.weight(), hessian) <= plain * (1 + 1e-9)).all()


@pytest.mark.parametrize(("rounding", "nearest"), [(round_int4, nearest_int4), (round_ternary, nearest_ternary)])
@pytest.mark.parametrize("columns", [48, 300])
def test_on_correlated_inputs_it_is_far_better(rounding, nearest, columns: int) -> None:
    weight, hessian = problem(0, 32, columns)
    plain = error(weight, nearest(weight, hessian.diagonal()), hessian)
    assert error(weight, rounding(weight, hessian), hessian) < 0.5 * plain
    assert torch.equal(rounding(weight, hessian).codes, rounding(weight, hessian).codes)


@given(st.integers(0, 2**31), SHAPES, st.floats(-4, 4))
@few
def test_a_ternary_weight_comes_back_as_it_is(seed: int, shape: tuple[int, int], magnitude: float) -> None:
    _, hessian = problem(seed, *shape)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, shape, generator=generator)
    weight = codes * (torch.rand(shape[0], 1, generator=generator) + 0.1) * 10**magnitude
    rounded = round_ternary(weight, hessian)
    assert torch.equal(rounded.codes, codes.to(torch.int8))
    torch.testing.assert_close(rounded.weight(), weight, rtol=3e-7, atol=0)


@pytest.mark.parametrize("rounding", [round_int4, round_ternary])
def test_inputs_and_channels_of_zeros(rounding) -> None:
    weight, hessian = problem(3, 4, 20)
    weight[1] = 0
    hessian[5] = hessian[:, 5] = 0
    rounded = rounding(weight, hessian)
    assert (rounded.codes[1] == 0).all()
    assert torch.isfinite(rounded.weight()).all()
    assert torch.isfinite(rounding(weight, torch.zeros_like(hessian)).weight()).all()


@pytest.mark.parametrize(
    ("columns", "block", "blocks"), [(256, 128, 2), (192, 64, 3), (96, 32, 3), (48, 16, 3), (70, 32, 3)]
)
def test_int4_has_a_scale_per_block(columns: int, block: int, blocks: int) -> None:
    assert int4_block(columns) == block
    weight, hessian = problem(0, 3, columns)
    rounded = round_int4(weight, hessian)
    assert rounded.scales.shape == (3, blocks)
    assert rounded.weight().shape == weight.shape


HESSIANS = {
    "of inputs": lambda columns: problem(5, 1, columns)[1],
    "of dead inputs": lambda columns: (
        problem(5, 1, columns)[1] * (torch.arange(columns) > 4).outer(torch.arange(columns) > 4)
    ),
    "of no inputs": lambda columns: torch.zeros(columns, columns),
}


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("rounding", [round_int4, round_ternary])
@pytest.mark.parametrize("shape", [(4, 20), (8, 64), (1, 130)])
def test_zeros_stay_exactly_zero(rounding, hessian: str, shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    rounded = rounding(weight, HESSIANS[hessian](shape[1]))
    assert not rounded.codes.any() and not rounded.weight().any()
    assert (rounded.scales > 0).all()


@pytest.mark.parametrize("magnitude", [1e-3, 1e-7, 1e-12, 1e-24, 1e6, 1e30])
@pytest.mark.parametrize("rounding", [round_int4, round_ternary, nearest_int4, nearest_ternary])
def test_a_layer_loses_the_same_share_at_any_magnitude(rounding, magnitude: float) -> None:
    weight, hessian = problem(7, 6, 48)
    given = hessian if rounding in (round_int4, round_ternary) else hessian.diagonal()

    def lost(scale: float) -> float:
        found = rounding(weight * scale, given).weight()
        return float((found.double() / scale - weight.double()).norm() / weight.double().norm())

    assert lost(magnitude) == pytest.approx(lost(1.0), rel=2e-2)


@pytest.mark.parametrize("rounding", [round_int4, round_ternary])
@pytest.mark.parametrize("value", [0.3, -2.0, 1e-9])
def test_channels_of_one_value_are_exact(rounding, value: float) -> None:
    _, hessian = problem(3, 4, 32)
    weight = torch.full((4, 32), value)
    torch.testing.assert_close(rounding(weight, hessian).weight(), weight, rtol=3e-7, atol=0)


@pytest.mark.parametrize("rounding", [round_int4, round_ternary])
def test_denormals_beside_ordinary_channels_are_finite(rounding) -> None:
    weight, hessian = problem(3, 4, 32)
    weight[1] = 1e-40
    weight[2] = 0
    rounded = rounding(weight, hessian)
    assert torch.isfinite(rounded.scales).all() and not rounded.weight()[2].any()
    assert rounded.weight()[1].abs().max() < 1e-28
