"""ONNX model-local functions of the ops."""

from __future__ import annotations

import onnx
import onnx.parser

from dexport.plugins.op import Op, resolve
from dexport.plugins.registry import find_op

MINIMUM_OPSET = 23
"""The first with ``Attention``."""


def function_proto(op: Op, *, opset: int = MINIMUM_OPSET, wide: bool = False) -> onnx.FunctionProto:
    """The op's function.

    Args:
        opset: of the standard operators; a model's own, at least 23.
        wide: compute in float32 where the body otherwise follows the type of its inputs.
    """
    if opset < MINIMUM_OPSET:
        raise ValueError(f"the functions need opset {MINIMUM_OPSET}, got {opset}")
    function = onnx.parser.parse_function(resolve(op.body)(opset, wide))
    for node in function.node:
        # TensorRT would name it after its output, which may be the name of the node that calls the function.
        node.name = f"{op.name}/{node.output[0]}"
    function.doc_string = op.summary
    property_ = function.metadata_props.add()
    property_.key, property_.value = "dexport.version", str(op.version)
    return function


def function_protos(op: Op, *, opset: int = MINIMUM_OPSET, wide: bool = False) -> list[onnx.FunctionProto]:
    """The functions of the op's parts, then its own."""
    parts = [function_proto(find_op(name), opset=opset, wide=wide) for name in op.parts]
    return [*parts, function_proto(op, opset=opset, wide=wide)]
