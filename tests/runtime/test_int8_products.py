"""Products of int8 are exact in every session, on every CPU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dexport.runtime import int8_products
from dexport.runtime.int8_products import (
    EXACT,
    LARGEST,
    PRODUCT,
    SIGNED,
    SIZE,
    UNSIGNED,
    caveat,
    is_exact,
    option_for,
)
from dexport.runtime.session import OnnxSession

DEPTH, WIDTH, GROUPS = 64, 16, 4
CODES = {"largest": 127, "smallest": -128, "random": None}
STEP = 2.0**10


def codes(shape: tuple[int, ...], value: int | None, seed: int = 0) -> np.ndarray:
    if value is None:
        return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
    return np.full(shape, value, np.int8)


def model(
    op: str, weight: np.ndarray, row: tuple[int, ...], *, rounded: bool, zero_point: bool, **attributes: int
) -> bytes:
    """``op`` between Q/DQ pairs, with INT8 weights: what W8A8 stores. ``rounded``: its result is int8 too."""
    channels = 0 if op == "Conv" else 1
    constants = {
        "one": np.float32(1),
        "step": np.float32(STEP),
        "zero": np.int8(0),
        "weight": weight,
        "scales": np.ones(weight.shape[channels], np.float32),
        "zeros": np.zeros(weight.shape[channels], np.int8),
    }
    stored = ["weight", "scales", "zeros"] if zero_point else ["weight", "scales"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", stored, ["dense"], axis=channels),
        helper.make_node(op, ["input", "dense"], ["product" if rounded else "out"], **attributes),
    ]
    if rounded:
        nodes += [
            helper.make_node("QuantizeLinear", ["product", "step", "zero"], ["out_codes"]),
            helper.make_node("DequantizeLinear", ["out_codes", "step", "zero"], ["out"]),
        ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *row])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A grouped convolution where the kernel covers the whole picture, in integers."""
    groups = x.shape[1] // weight.shape[1]
    rows = x.reshape(len(x), groups, -1)
    kernels = weight.reshape(groups, len(weight) // groups, -1)
    return np.einsum("bgi,goi->bgo", rows, kernels).reshape(len(x), len(weight), 1, 1)


CASES = [
    *(
        (op, (DEPTH, WIDTH), (DEPTH,), {}, rounded)
        for op, rounded in itertools.product(("MatMul", "Gemm"), (False, True))
    ),
    *(
        ("Conv", (WIDTH, WIDTH // group, size, size), (WIDTH, size, size), {"group": group}, rounded)
        for size, group, rounded in itertools.product((1, 3), (1, GROUPS, WIDTH), (False, True))
    ),
]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("value", CODES.values(), ids=CODES)
@pytest.mark.parametrize(("op", "shape", "row", "attributes", "rounded"), CASES)
def test_products_are_exact_at_extreme_values(
    op: str,
    shape: tuple[int, ...],
    row: tuple[int, ...],
    attributes: dict[str, int],
    rounded: bool,
    value: int | None,
    zero_point: bool,
) -> None:
    weight = codes(shape, value)
    x = np.concatenate([codes((2, *row), 127), codes((2, *row), -128), codes((4, *row), None, seed=1)])
    integers = x.astype(np.int64), weight.astype(np.int64)
    expected = (convolved(*integers) if op == "Conv" else integers[0] @ integers[1]).astype(np.float64)
    if rounded:
        expected = np.clip(np.rint(expected / STEP), -128, 127) * STEP
    session = OnnxSession(model(op, weight, row, rounded=rounded, zero_point=zero_point, **attributes), threads=1)
    for rows in (slice(None), slice(1), slice(4, 5)):
        got = session(x=x[rows].astype(np.float32))["out"]
        np.testing.assert_array_equal(got, expected[rows])


@pytest.mark.parametrize("value", CODES.values(), ids=CODES)
def test_two_layers_that_quantise_the_same_value(value: int | None) -> None:
    """As q and k, or the halves of a gated MLP."""
    constants: dict[str, Any] = {"zero": np.int8(0)}
    nodes, weights = [], [codes((DEPTH, WIDTH), value, seed) for seed in (0, 1)]
    for name, weight in zip("ab", weights, strict=True):
        constants |= {
            f"{name}.one": np.array(1, np.float32),
            f"{name}.scales": np.ones(WIDTH, np.float32),
            name: weight,
        }
        nodes += [
            helper.make_node("QuantizeLinear", ["x", f"{name}.one", "zero"], [f"{name}.codes"]),
            helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.one", "zero"], [f"{name}.x"]),
            helper.make_node("DequantizeLinear", [name, f"{name}.scales"], [f"{name}.w"], axis=1),
            helper.make_node("MatMul", [f"{name}.x", f"{name}.w"], [f"{name}.out"]),
        ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", DEPTH])],
        [helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None) for name in "ab"],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    x = codes((3, DEPTH), 127)
    got = OnnxSession(content, threads=1)(x=x.astype(np.float32))
    for name, weight in zip("ab", weights, strict=True):
        np.testing.assert_array_equal(got[f"{name}.out"], x.astype(np.int64) @ weight.astype(np.int64))


@pytest.mark.parametrize(
    ("op", "rounded", "zero_point", "option"),
    [
        ("MatMul", False, False, UNSIGNED),
        ("MatMul", True, False, UNSIGNED),
        ("Gemm", False, False, SIGNED),
        ("Gemm", True, False, SIGNED),
        ("Gemm", True, True, UNSIGNED),
        ("Conv", False, False, SIGNED),
        ("Conv", False, True, UNSIGNED),
        ("Conv", True, False, UNSIGNED),
    ],
)
def test_the_faster_option_is_taken_where_it_works(op: str, rounded: bool, zero_point: bool, option: str) -> None:
    conv = op == "Conv"
    weight = codes((WIDTH, WIDTH, 3, 3) if conv else (DEPTH, WIDTH), None)
    row = (WIDTH, 3, 3) if conv else (DEPTH,)
    assert option_for(model(op, weight, row, rounded=rounded, zero_point=zero_point)) == option


def weights_only(op: str) -> bytes:
    weight = codes((WIDTH, WIDTH, 3, 3) if op == "Conv" else (DEPTH, WIDTH), None)
    axis = 0 if op == "Conv" else 1
    shape = ["B", WIDTH, 3, 3] if op == "Conv" else ["B", DEPTH]
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["weight", "scales"], ["dense"], axis=axis),
            helper.make_node(op, ["x", "dense"], ["out"]),
        ],
        "weights",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.ones(WIDTH, np.float32), "scales")],
    )
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
def test_int8_weights_of_float_products_still_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weights_only(op)
    assert option_for(file) == SIGNED
    monkeypatch.setattr(int8_products, "is_exact", lambda _option=None: False)
    x = np.ones((2, WIDTH, 3, 3) if op == "Conv" else (2, DEPTH), np.float32)
    assert np.isfinite(OnnxSession(file)(x=x)["out"]).all()


def test_bytes_that_are_no_onnx_file_are_left_to_onnx_runtime() -> None:
    assert option_for(b"no ONNX file") == UNSIGNED


def test_the_probe_is_the_product_it_says() -> None:
    probe = onnx.load_from_string(PRODUCT)
    onnx.checker.check_model(probe, full_check=True)
    assert [node.op_type for node in probe.graph.node] == [
        *("QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul")
    ]
    weight = numpy_helper.to_array(probe.graph.initializer[0])
    assert (weight.dtype, weight.shape) == (np.int8, (SIZE, SIZE))
    assert (np.full((SIZE, SIZE), LARGEST) @ weight.astype(np.int64) == EXACT).all()


class Recording(ort.SessionOptions):
    """Session options that say which entries were set."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value
        super().add_session_config_entry(key, value)


@pytest.mark.parametrize(("by_default", "avoidable"), [(True, True), (False, True), (False, False)])
def test_only_a_cpu_that_saturates_pays_for_it(
    by_default: bool, avoidable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_products, "is_exact", lambda option=None: avoidable if option else by_default)
    options = Recording()
    int8_products.multiply_exactly(options, PRODUCT)
    assert options.entries == ({} if by_default else {UNSIGNED: "1"})
    said = caveat()
    if by_default:
        assert said is None
    else:
        assert said is not None
        assert ("its figures are exact" in said) == avoidable
        assert ("cannot avoid it" in said) != avoidable


@pytest.mark.parametrize("option", [UNSIGNED, SIGNED])
def test_this_onnx_runtime_multiplies_exactly_when_told_to(option: str) -> None:
    assert is_exact(option)
