"""Layouts of what stands between matrix products over the channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dexport.exporter.passes.channels_last import ChannelsLast
from dexport.exporter.passes.pointwise_conv import CHANNELS_FIRST, CHANNELS_LAST, PointwiseConvToMatMul
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value
from tests.golden import assert_golden

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5), dtype=np.float32)
W = RNG.standard_normal((3, 3, 1, 1), dtype=np.float32)
LAST = ("B", 4, 5, 3)
VECTOR = ("B", 3, 1, 1)


def block() -> tuple[ir.Model, Weight]:
    """conv1x1(gelu((norm(x) * (1 + scale)) + shift)) + x, modulated by c, and a table over the pixels."""
    x, c, out = value("x", ("B", 3, 4, 5)), value("c", ("B", 6)), value("out", ("B", 3, 4, 5))
    weight, table = Weight("w", W), Weight("table", X[:1])
    target = initializer(ir.Tensor(np.array([-1, 6, 1, 1]), name="target"))
    gain, one = (initializer(ir.Tensor(np.ones(n, np.float32), name=f"ones{n}")) for n in (3, 1))
    w, t = initializer(weight), initializer(table)
    vectors, shift, scale = value("vectors", ("B", 6, 1, 1)), value("shift", VECTOR), value("scale", VECTOR)
    split = ir.node("Split", [vectors], attributes={"axis": 1, "num_outputs": 2}, outputs=[shift, scale])
    names = ("back", "product", "sum", "act", "conv", "placed")
    first = {name: value(name, ("B", 3, 4, 5)) for name in names}
    turned, norm, gain1 = value("turned", LAST), value("norm", LAST), value("gain1", VECTOR)
    nodes = [
        node("Reshape", [c, target], vectors),
        split,
        node("Transpose", [x], turned, perm=CHANNELS_LAST),
        node("LayerNormalization", [turned, gain], norm),
        node("Transpose", [norm], first["back"], perm=CHANNELS_FIRST),
        node("Add", [scale, one], gain1),
        node("Mul", [first["back"], gain1], first["product"]),
        node("Add", [first["product"], shift], first["sum"]),
        node("Gelu", [first["sum"]], first["act"]),
        node("Conv", [first["act"], w], first["conv"], module="conv"),
        node("Add", [first["conv"], t], first["placed"]),
        node("Add", [first["placed"], x], out),
    ]
    return model([x, c], [out], nodes, [w, t, target, gain, one]), weight


def test_a_block_is_transposed_at_its_ends_only() -> None:
    feed = {"x": X, "c": RNG.standard_normal((2, 6), dtype=np.float32)}
    expected = run(block()[0], feed)[0]
    built, weight = block()
    PointwiseConvToMatMul()(built)
    assert ChannelsLast()(built).modified
    assert ops(built).count("Transpose") == 2
    assert [tuple(n.attributes.get_ints("perm")) for n in built.graph if n.op_type == "Transpose"] == [
        CHANNELS_LAST,
        CHANNELS_FIRST,
    ]
    assert weight.reads == 0
    assert [v.name for v in built.graph.outputs] == ["out"]
    assert_golden(run(built, feed)[0], expected)


def test_every_shape_is_that_of_the_value() -> None:
    built, _ = block()
    PointwiseConvToMatMul()(built)
    ChannelsLast()(built)
    recorded = {v.name: v.shape for n in built.graph for v in n.outputs}
    for v in (v for n in built.graph for v in n.outputs):
        v.shape = None
    inferred = ir.passes.common.ShapeInferencePass()(built).model
    for v in (v for n in inferred.graph for v in n.outputs):
        assert v.shape is not None
        static = [dim for dim in v.shape[1:] if isinstance(dim, int)]
        assert static == list(recorded[v.name][1:]), v.name


def test_again_changes_nothing() -> None:
    built, _ = block()
    PointwiseConvToMatMul()(built)
    ChannelsLast()(built)
    before = ops(built)
    ChannelsLast()(built)
    assert ops(built) == before


def test_another_reader_gets_channels_first() -> None:
    x, last, out = value("x", ("B", 3, 4, 5)), value("last", LAST), value("out", ("B", 3, 4, 5))
    act, sin = value("act", ("B", 3, 4, 5)), value("sin", LAST)
    nodes = [
        node("Transpose", [x], last, perm=CHANNELS_LAST),
        node("Gelu", [x], act),
        node("Sin", [last], sin),
        node("Sin", [act], out),
    ]
    built = model([x], [out, sin], nodes)
    expected = run(built.clone(), {"x": X})
    ChannelsLast()(built)
    for got, wanted in zip(run(built, {"x": X}), expected, strict=True):
        assert_golden(got, wanted)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 1, 1)])
def test_operands_that_mean_another_axis_stay(shape: tuple[int, ...]) -> None:
    weight = Weight("w", np.ones(shape, np.float32))
    w, x, last = initializer(weight), value("x", ("B", 3, 4, 5)), value("last", LAST)
    out = value("out", ("B", 3, 4, 5))
    nodes = [node("Transpose", [x], last, perm=CHANNELS_LAST), node("Add", [x, w], out)]
    assert not ChannelsLast()(model([x], [out, last], nodes, [w])).modified


def test_nothing_is_turned_without_a_transpose() -> None:
    x, out = value("x", ("B", 3, 4, 5)), value("out", ("B", 3, 4, 5))
    assert not ChannelsLast()(model([x], [out], [node("Gelu", [x], out)])).modified
