"""How the PyTorch references become ONNX nodes: the table that ``torch.onnx.export`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch

# Importing the references registers the operators.
import dexport.plugins.channel_attention.reference
import dexport.plugins.linear_attention.reference
import dexport.plugins.ternary_matmul.reference
import dexport.plugins.tmsa.reference  # noqa: F401
from dexport.plugins.op import DOMAIN, Op
from dexport.plugins.registry import find_op

TYPES = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` of ``torch.onnx.export``: one ``dexport`` node per reference."""
    operators = torch.ops.dexport
    return {
        operators.tmsa.default: _translation(find_op("DexTMSA")),
        operators.linear_attention.default: _translation(find_op("DexLinearAttention")),
        operators.channel_attention.default: _translation(find_op("DexChannelAttention")),
        operators.ternary_matmul.default: _translation(find_op("DexTernaryMatMul")),
    }


def schema(op: Op) -> onnx.defs.OpSchema:
    """The op's ONNX schema; it is not registered anywhere."""
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        1,
        doc=op.summary,
        inputs=[parameter(tensor.name, tensor_type(tensor.dtype)) for tensor in op.inputs],
        outputs=[parameter(tensor.name, tensor_type(tensor.dtype)) for tensor in op.outputs],
        type_constraints=[("T", TYPES, "the type of the op")],
        attributes=[
            onnx.defs.OpSchema.Attribute(a.name, onnx.defs.OpSchema.AttrType.INT, a.meaning, required=True)
            for a in op.attributes
        ],
    )


def tensor_type(dtype: str | None) -> str:
    """ONNX's name of a fixed type, or the op's type variable."""
    return "T" if dtype is None else {"float32": "tensor(float)", "uint8": "tensor(uint8)"}[dtype]


def _translation(op: Op) -> Callable[..., Any]:
    """Operator arguments, inputs then attributes, to a node."""
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), op.name, schema(op))
    count = len(op.inputs)

    def translate(*arguments: Any) -> Any:
        attributes = {a.name: value for a, value in zip(op.attributes, arguments[count:], strict=True)}
        return node(*arguments[:count], **attributes)

    return translate
