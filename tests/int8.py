"""Whether this processor adds INT8 products exactly in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

EXACT = "session.x64quantprecision"
"""The option that makes every processor exact; weights of INT8 without zero points do not run with it."""


def products_are_exact() -> bool:
    """False on x86 without VNNI, where pairs of products are added in 16 bits and saturate."""
    one, zero = numpy_helper.from_array(np.float32(1), "one"), numpy_helper.from_array(np.int8(0), "zero")
    weight = numpy_helper.from_array(np.full((32, 2), 127, np.int8), "weight")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "one", "zero"], ["w"]),
        helper.make_node("MatMul", ["rounded", "w"], ["out"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 32])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", 2])
    graph = helper.make_graph(nodes, "int8", [x], [out], [one, zero, weight])
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.full((1, 32), 127, np.float32)})
    return bool((got == 127 * 127 * 32).all())


needs_exact_products = pytest.mark.skipif(
    not products_are_exact(), reason="INT8 products saturate on this processor (no VNNI), and its gate says so"
)
