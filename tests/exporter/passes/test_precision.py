"""The precision pass and its emulation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dexport.errors import InputError
from dexport.exporter.passes.emulate_low_precision import EmulateLowPrecision
from dexport.exporter.passes.precision import ToLowPrecision, precision_map
from dexport.exporter.recipes.recipe import Islands
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 8), dtype=np.float32)
X = RNG.standard_normal((3, 8), dtype=np.float32)


def two_layers(weight: ir.TensorProtocol, islands: Islands, precision: str = "fp16") -> ir.Model:
    """x @ w in module ``low``, then Neg in module ``island``, then the same w again in ``low``."""
    x, w = value("x", ("B", 8)), initializer(weight)
    a, b, out = (value(name, ("B", 8)) for name in ("a", "b", "out"))
    nodes = [
        node("MatMul", [x, w], a, module="low.0"),
        node("Neg", [a], b, module="island"),
        node("MatMul", [b, w], out, module="low.1"),
    ]
    return ToLowPrecision(precision, islands)(model([x], [out], nodes, [w])).model


def test_io_stays_float32_and_islands_are_bracketed_by_casts() -> None:
    built = two_layers(Weight("w", W), Islands(modules=("island",), ops=()))
    assert ops(built) == ["Cast", "MatMul", "Cast", "Neg", "Cast", "MatMul", "Cast"]
    assert built.graph.inputs[0].dtype == FLOAT
    assert built.graph.outputs[0].dtype == FLOAT
    assert built.graph.outputs[0].name == "out"
    assert precision_map(built) == {"a": "float16", "b": "float32", "out": "float16"}
    (out,) = run(built, {"x": X})
    assert np.linalg.norm(out - (-X @ W @ W)) / np.linalg.norm(out) < 3e-3


def test_weights_are_cast_lazily_and_keep_their_names() -> None:
    weight = Weight("w", W)
    built = two_layers(weight, Islands(modules=("island",), ops=()))
    assert weight.reads == 0
    assert list(built.graph.initializers) == ["w"]
    assert built.graph.initializers["w"].dtype == HALF
    np.testing.assert_array_equal(built.graph.initializers["w"].const_value.numpy(), W.astype(np.float16))


def test_a_weight_that_both_sides_read_exists_twice() -> None:
    x, w = value("x", ("B", 8)), initializer(Weight("w", W))
    a, out = value("a", ("B", 8)), value("out", ("B", 8))
    nodes = [node("MatMul", [x, w], a, module="island"), node("MatMul", [a, w], out, module="low")]
    built = ToLowPrecision("fp16", Islands(("island",), ()))(model([x], [out], nodes, [w])).model
    assert {name: v.dtype for name, v in built.graph.initializers.items()} == {"w": FLOAT, "w/float16": HALF}


def test_guidance_is_always_an_island() -> None:
    x, a, out = value("x", ("B", 8)), value("a", ("B", 8)), value("out", ("B", 8))
    nodes = [node("Neg", [x], a, module="low"), node("Neg", [a], out, module="guidance")]
    built = ToLowPrecision("fp16", Islands((), ()))(model([x], [out], nodes)).model
    assert precision_map(built) == {"a": "float16", "out": "float32"}


def test_timesteps_reach_an_island_without_passing_through_half_precision() -> None:
    """999.37 is not a float16: the Concat in front of the island has to move float32."""
    t, double, out = value("t", ("B",)), value("double", ("2*B",)), value("out", ("2*B",))
    nodes = [node("Concat", [t, t], double, axis=0), node("Sin", [double], out, module="t_embedder")]
    built = ToLowPrecision("fp16", Islands(("t_embedder",), ()))(model([t], [out], nodes)).model
    assert ops(built) == ["Concat", "Sin"]
    np.testing.assert_allclose(run(built, {"t": np.float32([999.37])})[0], np.sin(np.float32([999.37] * 2)), rtol=1e-5)


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 7e4), ("bf16", 3.4e38)])
def test_a_weight_too_large_for_the_precision_is_an_error_that_names_it(precision: str, limit: float) -> None:
    weight = Weight("blocks.0.w", np.full((8, 8), limit, dtype=np.float32))
    built = two_layers(weight, Islands((), ()), precision)
    with pytest.raises(InputError, match=r"blocks\.0\.w"):
        built.graph.initializers["blocks.0.w"].const_value.numpy()


@given(st.integers(0, 1000), st.sampled_from(["fp16", "bf16"]))
@settings(max_examples=10, deadline=None)
def test_emulation_rounds_after_every_operator(seed: int, precision: str) -> None:
    import torch

    low = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((3, 8), (8, 8)))
    built = two_layers(ir.Tensor(w, name="w"), Islands((), ()), precision)
    assert EmulateLowPrecision()(built).modified
    (out,) = run(built, {"x": x})

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(low).float()

    w_low = rounded(torch.from_numpy(w))
    hidden = rounded(rounded(torch.from_numpy(x)) @ w_low)
    expected = rounded(-hidden @ w_low)
    # Another order of summation may tip a value over to the next representable one.
    tolerance = {"fp16": 2e-3, "bf16": 2e-2}[precision]
    np.testing.assert_allclose(out, expected.numpy(), rtol=tolerance, atol=tolerance)
    assert np.array_equal(out, rounded(torch.from_numpy(out)).numpy())


def test_emulation_shows_an_overflow_that_onnx_runtime_hides() -> None:
    x, a, out = value("x", ("B", 8)), value("a", ("B", 8)), value("out", ("B", 8))
    scale = initializer(ir.Tensor(np.float32(1e4), name="scale"))
    shrink = initializer(ir.Tensor(np.float32(1e-4), name="shrink"))
    nodes = [node("Mul", [x, scale], a), node("Mul", [a, shrink], out)]

    def build() -> ir.Model:
        return ToLowPrecision("fp16", Islands((), ()))(model([x], [out], nodes, [scale, shrink])).model

    built = build()
    feed = {"x": np.full((1, 8), 10, dtype=np.float32)}
    assert np.isfinite(run(built, feed)[0]).all()
    EmulateLowPrecision()(built)
    assert np.isinf(run(built, feed)[0]).all()
