"""Small onnx-ir models for pass tests, and a runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dexport.runtime.int8_products import multiply_exactly

FLOAT = ir.DataType.FLOAT


class Weight(ir.LazyTensor):
    """A lazy weight that counts how often it is read."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.reads = 0

        def read() -> ir.TensorProtocol:
            self.reads += 1
            return ir.Tensor(array, name=name)

        super().__init__(read, dtype=ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape), name=name)

    __slots__ = ("reads",)


def value(name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def initializer(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape)), const_value=tensor
    )


def node(op: str, inputs: Sequence[ir.Value | None], out: ir.Value, *, module: str = "", **attributes) -> ir.Node:
    return ir.node(
        op,
        inputs,
        attributes=attributes,
        outputs=[out],
        name=out.name,
        metadata_props={"dexport.module": module} if module else None,
    )


def model(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node], weights: Sequence[ir.Value] = ()
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="test")
    return ir.Model(graph, ir_version=11)


def run(built: ir.Model, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(built).SerializeToString()
    multiply_exactly(options, proto)
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, dict(feed))


def ops(built: ir.Model) -> list[str]:
    return [n.op_type for n in built.graph]
