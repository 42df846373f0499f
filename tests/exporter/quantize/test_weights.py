"""INT8 weights and 1x1 convolutions as matrix products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dexport.exporter.passes.lazy import as_torch
from dexport.exporter.passes.pointwise_conv import PointwiseConvToMatMul
from dexport.exporter.quantize.layers import graph_layers
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.weights import (
    SMALLEST_HALF_SCALE,
    SMALLEST_SCALE,
    channel_scale,
    quantise,
    smallest_scale,
)
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value
from tests.golden import assert_golden

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8), dtype=np.float32)


def linear(weight: Weight, op: str = "MatMul", dtype: ir.DataType = ir.DataType.FLOAT, **attributes) -> ir.Model:
    x, out = value("x", ("B", 8), dtype), value("out", ("B", 4), dtype)
    w = initializer(weight)
    return model([x], [out], [node(op, [x, w], out, module="blocks.0.fc", **attributes)], [w])


@pytest.mark.parametrize(
    ("op", "name", "shape", "axis"), [("MatMul", ".weight.T", (8, 4), 1), ("Gemm", ".weight", (4, 8), 0)]
)
def test_a_weight_becomes_int8_with_a_scale_per_output_channel(op: str, name: str, shape: tuple, axis: int) -> None:
    array = RNG.standard_normal(shape, dtype=np.float32)
    weight = Weight(f"blocks.0.fc{name}", array)
    built = linear(weight, op, **({"transB": 1} if op == "Gemm" else {}))
    before = run(built, {"x": X})[0]
    weight.reads = 0
    assert Plan({"blocks.0.fc": "int8"}).apply(built) == {"blocks.0.fc": "int8"}
    assert weight.reads == 0
    assert ops(built) == ["DequantizeLinear", op]
    stored = built.graph.initializers
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == {
        f"blocks.0.fc{name}/int8": (ir.DataType.INT8, shape),
        f"blocks.0.fc{name}/scale": (ir.DataType.FLOAT, (4,)),
    }
    assert built.graph.node(0).attributes.get_int("axis") == axis
    after = run(built, {"x": X})[0]
    assert 0 < np.linalg.norm(after - before) / np.linalg.norm(before) < 1e-2


def test_what_is_excluded_or_not_a_modules_own_stays() -> None:
    array = RNG.standard_normal((8, 4), dtype=np.float32)
    assert graph_layers(linear(Weight("table", array))) == {}
    built = linear(Weight("blocks.0.fc.weight.T", array))
    assert Plan({"blocks.0.fc": "float"}).apply(built) == {}
    assert ops(built) == ["MatMul"]


def test_codes_are_rounded_to_the_stored_half_precision_scales() -> None:
    array = RNG.standard_normal((8, 4)).astype(np.float16)
    built = linear(Weight("blocks.0.fc.weight.T", array), dtype=ir.DataType.FLOAT16)
    Plan({"blocks.0.fc": "int8"}).apply(built)
    codes, scale = (as_torch(v.const_value).float() for v in built.graph.initializers.values())
    assert built.graph.initializers["blocks.0.fc.weight.T/scale"].dtype == ir.DataType.FLOAT16
    assert ((codes * scale - torch.from_numpy(array).float()).abs() <= scale * 0.56).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6, 6), st.integers(0, 1))
def test_the_error_of_a_weight_is_half_a_step_at_most(seed: int, magnitude: float, axis: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator) * 10**magnitude
    weight[1, 2] = 0
    scale = channel_scale(weight, axis).unsqueeze(1 - axis)
    codes = quantise(weight, scale)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 127
    assert ((codes * scale - weight).abs() <= scale * 0.501).all()


def test_a_channel_of_zeros_has_a_scale() -> None:
    weight = torch.zeros(2, 3)
    assert (channel_scale(weight, 0) == SMALLEST_SCALE).all()
    assert (quantise(weight, torch.tensor(SMALLEST_SCALE)) == 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_becomes_a_matrix_product(bias: bool) -> None:
    x, out = value("x", ("B", 3, 4, 5)), value("out", ("B", 6, 4, 5))
    weight = Weight("c.weight", RNG.standard_normal((6, 3, 1, 1), dtype=np.float32))
    weights = [initializer(weight)]
    if bias:
        weights.append(initializer(Weight("c.bias", RNG.standard_normal(6, dtype=np.float32))))
    built = model([x], [out], [node("Conv", [x, *weights], out, module="c", kernel_shape=[1, 1])], weights)
    feed = {"x": RNG.standard_normal((2, 3, 4, 5), dtype=np.float32)}
    before = run(built, feed)[0]
    weight.reads = 0
    assert PointwiseConvToMatMul()(built).modified
    assert weight.reads == 0
    assert ops(built) == ["Transpose", "MatMul", *(["Add"] if bias else []), "Transpose"]
    assert len({n.name for n in built.graph}) == len(ops(built))
    assert [v.name for v in built.graph.outputs] == ["out"]
    assert_golden(run(built, feed)[0], before)


@pytest.mark.parametrize("attributes", [{"strides": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"group": 3}])
def test_other_convolutions_stay(attributes: dict) -> None:
    x, out = value("x", ("B", 3, 4, 4)), value("out", ("B", 3, None, None))
    w = initializer(Weight("c.weight", np.ones((3, 3 // attributes.get("group", 1), 1, 1), np.float32)))
    built = model([x], [out], [node("Conv", [x, w], out, module="c", **attributes)], [w])
    assert not PointwiseConvToMatMul()(built).modified


@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 1e-12, 1e-24, 1e30])
def test_int8_loses_the_same_share_at_any_magnitude(magnitude: float) -> None:
    weight = torch.from_numpy(RNG.standard_normal((5, 32), dtype=np.float32)) * magnitude
    weight[1] = 0
    scale = channel_scale(weight, 0)[:, None]
    codes = quantise(weight, scale)
    assert not codes[1].any()
    error = (codes.double() * scale.double() - weight.double()).norm() / weight.double().norm()
    assert float(error) < 1e-2


def test_float16_keeps_the_scale_that_it_can_hold() -> None:
    assert (smallest_scale(torch.float16), smallest_scale(torch.bfloat16)) == (SMALLEST_HALF_SCALE, SMALLEST_SCALE)
    weight = torch.full((1, 4), 1e-9)
    scale = channel_scale(weight, 0, smallest_scale(torch.float16))
    assert not quantise(weight, scale[:, None]).any()
