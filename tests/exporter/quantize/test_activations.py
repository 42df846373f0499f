"""Q/DQ around layers, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dexport.errors import InputError
from dexport.exporter.passes.precision import precision_map
from dexport.exporter.quantize.activations import INPUT, quantise_value
from dexport.exporter.quantize.observer import LayerStatistics, TensorStatistics
from dexport.exporter.quantize.plan import Plan
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value

RNG = np.random.default_rng(0)


def statistics(x: np.ndarray, y: np.ndarray | None = None) -> LayerStatistics:
    seen = LayerStatistics(np.ones(x.shape[1], np.float32))
    seen.input.observe(x, 1, 0.0)
    if y is not None:
        seen.output.observe(y, 1, 0.0)
    return seen


def convolution(bias: np.ndarray | None) -> tuple[ir.Model, np.ndarray]:
    x, out = value("x", ("B", 8, 6, 6)), value("out", ("B", 4, 6, 6))
    arrays = [("c.weight", RNG.standard_normal((4, 8, 3, 3), dtype=np.float32) / 8)]
    if bias is not None:
        arrays.append(("c.bias", bias))
    weights = [initializer(Weight(name, array)) for name, array in arrays]
    conv = node("Conv", [x, *weights], out, module="c", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return model([x], [out], [conv], weights), RNG.standard_normal((2, 8, 6, 6), dtype=np.float32)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.floats(1e-3, 1e4),
)
def test_what_is_larger_than_the_threshold_saturates(x: np.ndarray, threshold: float) -> None:
    source, out = value("x", ("B",)), value("out", ("B",))
    built = model([source], [out], [node("Identity", [source], out, module="m")])
    last = built.graph.node(0)
    last.replace_input_with(0, quantise_value(built.graph, source, threshold, "m", INPUT, before=last))
    got = run(built, {"x": x})[0]
    step = np.float32(threshold / 127)
    assert (np.abs(got - np.clip(x, -128 * step, 127 * step)) <= step * 0.501).all()


def test_a_linear_layer_reads_and_multiplies_int8() -> None:
    x, out = value("x", ("B", 16)), value("out", ("B", 8))
    w = initializer(Weight("fc.weight.T", RNG.standard_normal((16, 8), dtype=np.float32)))
    built = model([x], [out], [node("MatMul", [x, w], out, module="fc")], [w])
    feed = RNG.standard_normal((32, 16), dtype=np.float32)
    before = run(built, {"x": feed})[0]
    assert Plan({"fc": "w8a8"}, {"fc": statistics(feed)}).apply(built) == {"fc": "w8a8"}
    assert ops(built) == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "MatMul"]
    assert precision_map(built) == {
        "fc/DequantizeLinear": "float32",
        "fc/QuantizeLinear": "int8",
        "fc/DequantizeLinear_1": "float32",
        "out": "float32",
    }
    assert np.linalg.norm(run(built, {"x": feed})[0] - before) / np.linalg.norm(before) < 2e-2


@pytest.mark.parametrize("bias", [None, RNG.standard_normal(4).astype(np.float32) * 30])
def test_a_convolution_writes_int8_before_its_bias(bias: np.ndarray | None) -> None:
    built, feed = convolution(bias)
    before = run(built, {"x": feed})[0]
    unbiased = before - (0 if bias is None else bias.reshape(-1, 1, 1))
    Plan({"c": "w8a8"}, {"c": statistics(feed, unbiased)}).apply(built)
    added = [] if bias is None else ["Add"]
    assert ops(built)[2:] == ["DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear", *added]
    assert len({n.name for n in built.graph}) == len(ops(built))
    assert [v.name for v in built.graph.outputs] == ["out"]
    assert np.linalg.norm(run(built, {"x": feed})[0] - before) / np.linalg.norm(unbiased) < 3e-2


def test_a_calibration_of_other_layers_is_refused() -> None:
    built, feed = convolution(None)
    with pytest.raises(InputError, match=r"layers that are not known elsewhere: a, b"):
        Plan({"c": "w8a8"}, {"b": statistics(feed), "a": statistics(feed)}).apply(built)


def test_a_silent_input_has_a_scale() -> None:
    seen = TensorStatistics()
    seen.observe(np.zeros((1, 4), np.float32), 1, 0.0)
    source, out = value("x", ("B", 4)), value("out", ("B", 4))
    built = model([source], [out], [node("Identity", [source], out, module="m")])
    last = built.graph.node(0)
    last.replace_input_with(0, quantise_value(built.graph, source, seen.threshold("mse"), "m", INPUT, before=last))
    assert (run(built, {"x": np.zeros((1, 4), np.float32)})[0] == 0).all()
