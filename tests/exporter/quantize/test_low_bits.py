"""INT4 and ternary weights in a graph: every carrier multiplies with exactly the codes and scales that were chosen."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.pointwise_conv import PointwiseConvToMatMul
from dexport.exporter.quantize.carriers import int4_bytes, nbits_bytes
from dexport.exporter.quantize.gptq import Rounded, int4_block, round_int4, round_ternary
from dexport.exporter.quantize.layers import graph_layers
from dexport.exporter.quantize.low_bits import LowBits, carrier_of, store_low_bits
from tests.exporter.passes.model import Weight, initializer, model, node, run, value

CARRIERS = {"int4": ("int4", "nbits4"), "ternary": ("packed", "int4", "int8", "nbits2", "nbits4")}
CASES = [(scheme, carrier) for scheme, carriers in CARRIERS.items() for carrier in carriers]
few = settings(max_examples=6, deadline=None, derandomize=True)


def rounded(scheme: str, rows: int, columns: int, seed: int) -> Rounded:
    rng = np.random.default_rng(seed)
    block, levels = (int4_block(columns), 7) if scheme == "int4" else (columns, 1)
    codes = torch.from_numpy(rng.integers(-levels, levels + 1, (rows, columns)).astype(np.int8))
    scales = torch.from_numpy(rng.uniform(0.01, 2, (rows, -(-columns // block))).astype(np.float32))
    return Rounded(codes, scales, block)


def built(op: str, rows: int, columns: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    array = np.zeros((rows, columns), dtype.numpy())
    bias = initializer(ir.Tensor(np.arange(rows, dtype=dtype.numpy()), name="m.bias"))
    shapes = {
        "MatMul": (("B", 5, columns), ("B", 5, rows)),
        "Gemm": (("B", columns), ("B", rows)),
        "Conv": (("B", columns, 2, 3), ("B", rows, 2, 3)),
    }
    x, out = (value(name, shape, dtype) for name, shape in zip(("x", "out"), shapes[op], strict=True))
    match op:
        case "MatMul":
            weights = [initializer(Weight("m.weight.T", array.T))]
            graph = model([x], [out], [node("MatMul", [x, *weights], out, module="m")], weights)
        case "Gemm":
            weights = [initializer(Weight("m.weight", array)), bias]
            graph = model([x], [out], [node("Gemm", [x, *weights], out, module="m", transB=1)], weights)
        case _:
            weights = [initializer(Weight("m.weight", array[:, :, None, None])), bias]
            conv = node("Conv", [x, *weights], out, module="m", kernel_shape=[1, 1])
            graph = model([x], [out], [conv], weights)
            PointwiseConvToMatMul()(graph)
    return graph


def stored(graph: ir.Model, scheme: str, carrier: str, weight: Rounded) -> ir.Model:
    layer = graph_layers(graph)["m"]
    before = layer.weight.const_value
    rows, columns = weight.codes.shape
    store_low_bits(graph.graph, LowBits(layer, scheme, rows, columns, lambda: weight), carrier_of(rows, carrier))
    assert before.reads == 0 if isinstance(before, Weight) else True
    AttachFunctions()(graph)
    return graph


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize(("scheme", "carrier"), CASES)
@given(rows=st.integers(1, 12), columns=st.integers(1, 80), seed=st.integers(0, 2**31))
@few
def test_the_product_is_that_of_codes_and_scales(
    op: str, scheme: str, carrier: str, rows: int, columns: int, seed: int
) -> None:
    weight = rounded(scheme, rows, columns, seed)
    graph = stored(built(op, rows, columns), scheme, carrier, weight)
    shape = {"MatMul": (2, 5, columns), "Gemm": (3, columns), "Conv": (2, columns, 2, 3)}[op]
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    equation = "bchw,oc->bohw" if op == "Conv" else "...c,oc->...o"
    wanted = np.einsum(equation, x, weight.weight().numpy())
    bias = np.arange(rows, dtype=np.float32)
    wanted += 0 if op == "MatMul" else bias.reshape(-1, 1, 1) if op == "Conv" else bias
    got = run(graph, {"x": x})[0]
    np.testing.assert_allclose(got, wanted, atol=2e-5 * columns**0.5)
    assert len({n.name for n in graph.graph}) == len(list(graph.graph))
    assert [v.name for v in graph.graph.outputs] == ["out"]


@pytest.mark.parametrize(("scheme", "carrier"), CASES)
def test_scales_have_the_type_of_the_graph(scheme: str, carrier: str) -> None:
    weight = rounded(scheme, 8, 32, 0)
    graph = stored(built("MatMul", 8, 32, ir.DataType.FLOAT16), scheme, carrier, weight)
    types = {value.dtype for value in graph.graph.initializers.values()}
    assert ir.DataType.FLOAT not in types and ir.DataType.FLOAT16 in types
    x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float16)
    wanted = x.astype(np.float32) @ weight.weight().numpy().T
    error = np.linalg.norm(run(graph, {"x": x})[0].astype(np.float32) - wanted)
    assert error < 2e-3 * np.linalg.norm(wanted)


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
@few
def test_codes_come_back_from_their_bytes(rows: int, columns: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-8, 8, (rows, columns)).astype(np.int8))
    halves = torch.stack([int4_bytes(codes) & 15, int4_bytes(codes) >> 4], 1).flatten()[: codes.numel()]
    assert torch.equal(torch.where(halves > 7, halves.int() - 16, halves.int()).view_as(codes), codes.int())
    for bits, low in ((4, codes), (2, codes.clamp(-2, 1))):
        data = nbits_bytes(low, bits, 16)
        parts = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        unpacked = torch.stack(parts, 3).flatten(1)[:, :columns].int() - (1 << bits - 1)
        assert torch.equal(unpacked, low.int())


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize(("scheme", "carrier"), CASES)
def test_a_layer_of_zeros_gives_exactly_its_bias(op: str, dtype: ir.DataType, scheme: str, carrier: str) -> None:
    rows, columns = 8, 70
    rounding = {"int4": round_int4, "ternary": round_ternary}[scheme]
    graph = stored(
        built(op, rows, columns, dtype), scheme, carrier, rounding(torch.zeros(rows, columns), torch.eye(70))
    )
    shape = {"MatMul": (2, 5, columns), "Gemm": (3, columns), "Conv": (2, columns, 2, 3)}[op]
    x = (100 * np.random.default_rng(0).standard_normal(shape)).astype(dtype.numpy())
    got = run(graph, {"x": x})[0]
    bias = np.arange(rows).reshape((-1, 1, 1) if op == "Conv" else -1) * (op != "MatMul")
    np.testing.assert_array_equal(got, np.broadcast_to(bias, got.shape).astype(got.dtype))


@pytest.mark.parametrize(("scheme", "carrier"), CASES)
def test_what_float16_cannot_hold_is_zero_and_not_enlarged(scheme: str, carrier: str) -> None:
    weight = rounded(scheme, 8, 32, 0)
    tiny = Rounded(weight.codes, weight.scales.clone(), weight.block)
    tiny.scales[3] = 1e-9
    graph = stored(built("MatMul", 8, 32, ir.DataType.FLOAT16), scheme, carrier, tiny)
    got = run(graph, {"x": np.full((1, 5, 32), 100, np.float16)})[0]
    assert np.isfinite(got).all() and not got[..., 3].any() and got[..., 0].any()
