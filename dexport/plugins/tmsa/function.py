"""DexTMSA as an ONNX function.

The (T, T) index is computed from ``window``, so a model file holds the small tables only. Argument names are
unique across functions and models: older TensorRT parsers confuse a function's argument with a tensor of the
same name outside.
"""

from __future__ import annotations

HEAD = """
<domain: "dexport", opset_import: ["" : {opset}]>
DexTMSA <num_heads, window> (tmsa_qkv, tmsa_qkv_time, tmsa_bias_table) => (tmsa_out)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    window_side = Constant <value_int: int = @window> ()
    tokens = Mul (window_side, window_side)
    token = Range (zero, tokens, one)
    row = Div (token, window_side)
    column = Mod (token, window_side)
    double = Mul (two, window_side)
    table_side = Sub (double, one)
    row_place = Mul (row, table_side)
    place = Add (row_place, column)
    query_place = Unsqueeze (place, axis_1)
    key_place = Unsqueeze (place, axis_0)
    distance = Sub (query_place, key_place)
    last = Sub (window_side, one)
    centre = Mul (double, last)
    index = Add (distance, centre)
    bias_heads = Gather <axis = 1> (tmsa_bias_table, index)
    bias = Unsqueeze (bias_heads, axis_0)
    time = Unsqueeze (tmsa_qkv_time, axis_1)
"""

NARROW = """
    packed = Add (tmsa_qkv, time)
    q, k, v = Split <axis = 2, num_outputs = 3> (packed)
    tmsa_out = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads> (q, k, v, bias)
}}
"""

WIDE = """
    heads_scalar = Constant <value_int: int = @num_heads> ()
    heads = Unsqueeze (heads_scalar, axis_0)
    keep = Constant <value_ints = [0, 0]> ()
    infer = Constant <value_ints = [-1]> ()
    split_shape = Concat <axis = 0> (keep, heads, infer)
    merged_shape = Constant <value_ints = [0, 0, -1]> ()
    qkv_wide = Cast <to = 1> (tmsa_qkv)
    time_wide = Cast <to = 1> (time)
    bias_wide = Cast <to = 1> (bias)
    packed = Add (qkv_wide, time_wide)
    q_merged, k_merged, v_merged = Split <axis = 2, num_outputs = 3> (packed)
    q_split = Reshape (q_merged, split_shape)
    k_split = Reshape (k_merged, split_shape)
    v_split = Reshape (v_merged, split_shape)
    q = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k = Transpose <perm = [0, 2, 3, 1]> (k_split)
    v = Transpose <perm = [0, 2, 1, 3]> (v_split)
    size_int = Shape <start = 3, end = 4> (q)
    size = Cast <to = 1> (size_int)
    root = Sqrt (size)
    q_scaled = Div (q, root)
    products = MatMul (q_scaled, k)
    logits = Add (products, bias_wide)
    weights = Softmax <axis = -1> (logits)
    mixed = MatMul (weights, v)
    result = Transpose <perm = [0, 2, 1, 3]> (mixed)
    merged = Reshape (result, merged_shape)
    tmsa_out = CastLike (merged, tmsa_qkv)
}}
"""


def body(opset: int = 23, wide: bool = False) -> str:
    """The function's text.

    Normally ``Attention`` runs in the type of the inputs, which runtimes have fused kernels for; its logits
    then must stay within that type's range. ``wide`` spells attention out in float32, whatever the inputs
    are: for float32 engines, because TensorRT-RTX 1.7 has no ``Attention`` in float32, and for logits beyond
    65504.
    """
    return (HEAD + (WIDE if wide else NARROW)).format(opset=opset)
