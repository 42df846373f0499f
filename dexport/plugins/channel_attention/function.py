"""DexChannelAttention as ONNX functions: one that is made of two parts, because each part is one TensorRT
plugin.

The parts have no attributes: older TensorRT parsers do not pass attributes through two levels of functions.
"""

from __future__ import annotations

BODY = """
<domain: "dexport", opset_import: ["" : {opset}, "dexport" : 1]>
DexChannelAttention (chatt_x, chatt_weight, chatt_bias) => (chatt_out)
{{
    chatt_pooled = dexport.DexChannelAttentionPool (chatt_x)
    chatt_out = dexport.DexChannelAttentionScale (chatt_x, chatt_pooled, chatt_weight, chatt_bias)
}}
"""

POOL = """
<domain: "dexport", opset_import: ["" : {opset}]>
DexChannelAttentionPool (chatt_x) => (chatt_pooled)
{{
    axes = Constant <value_ints = [2, 3]> ()
    x_wide = Cast <to = 1> (chatt_x)
    chatt_pooled = ReduceMean <keepdims = 0> (x_wide, axes)
}}
"""

SCALE = """
<domain: "dexport", opset_import: ["" : {opset}]>
DexChannelAttentionScale (chatt_x, chatt_pooled, chatt_weight, chatt_bias) => (chatt_out)
{{
    axes = Constant <value_ints = [2, 3]> ()
    means = CastLike (chatt_pooled, chatt_weight)
    matrix = Flatten <axis = 1> (chatt_weight)
    logits = Gemm <transB = 1> (means, matrix, chatt_bias)
    gates_flat = Sigmoid (logits)
    gates = Unsqueeze (gates_flat, axes)
    chatt_out = Mul (chatt_x, gates)
}}
"""


def body(opset: int = 23, _wide: bool = False) -> str:
    """The whole op's text."""
    return BODY.format(opset=opset)


def pool_body(opset: int = 23, _wide: bool = False) -> str:
    """The mean's text."""
    return POOL.format(opset=opset)


def scale_body(opset: int = 23, _wide: bool = False) -> str:
    """The gate's text."""
    return SCALE.format(opset=opset)
