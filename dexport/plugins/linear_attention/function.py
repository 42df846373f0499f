"""DexLinearAttention as an ONNX function; it computes in float32 whatever the inputs are, as the authors
do."""

from __future__ import annotations

BODY = """
<domain: "dexport", opset_import: ["" : {opset}]>
DexLinearAttention <num_heads> (linatt_q, linatt_k, linatt_v) => (linatt_out)
{{
    eps = Constant <value_float = 1e-6> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_3 = Constant <value_ints = [3]> ()
    keep = Constant <value_ints = [0, 0]> ()
    infer = Constant <value_ints = [-1]> ()
    heads_scalar = Constant <value_int: int = @num_heads> ()
    heads = Unsqueeze (heads_scalar, axis_0)
    split_shape = Concat <axis = 0> (keep, heads, infer)
    merged_shape = Constant <value_ints = [0, 0, -1]> ()

    q_wide = Cast <to = 1> (linatt_q)
    q_split = Reshape (q_wide, split_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    q_relu = Relu (q_heads)
    q = Add (q_relu, eps)
    k_wide = Cast <to = 1> (linatt_k)
    k_split = Reshape (k_wide, split_shape)
    k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
    k_relu = Relu (k_heads)
    k = Add (k_relu, eps)
    v_wide = Cast <to = 1> (linatt_v)
    v_split = Reshape (v_wide, split_shape)
    v = Transpose <perm = [0, 2, 1, 3]> (v_split)

    tokens_int = Shape <start = 1, end = 2> (linatt_q)
    tokens = Cast <to = 1> (tokens_int)
    root = Sqrt (tokens)
    k_scaled = Div (k, root)
    v_scaled = Div (v, root)
    state = MatMul (k_scaled, v_scaled)
    mean_k = ReduceMean <keepdims = 1> (k, axis_3)
    overlap = MatMul (q, mean_k)
    denominator = Add (overlap, eps)
    numerator = MatMul (q, state)
    ratio = Div (numerator, denominator)
    result = Transpose <perm = [0, 2, 1, 3]> (ratio)
    merged = Reshape (result, merged_shape)
    linatt_out = CastLike (merged, linatt_q)
}}
"""


def body(opset: int = 23, _wide: bool = False) -> str:
    """The function's text."""
    return BODY.format(opset=opset)
