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
    qkv_wide = Cast <to = 1> (tmsa_qkv)
    time_wide = Cast <to = 1> (time)
    bias_wide = Cast <to = 1> (bias)
    packed = Add (qkv_wide, time_wide)
    q, k, v = Split <axis = 2, num_outputs = 3> (packed)
    result = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads> (q, k, v, bias_wide)
    tmsa_out = CastLike (result, tmsa_qkv)
}}
"""


def body(opset: int = 23, wide: bool = False) -> str:
    """The function's text.

    ``wide`` computes in float32 whatever the inputs are. Otherwise ``Attention`` runs in their type, which
    runtimes have fused kernels for; its logits then must stay within that type's range.
    """
    return (HEAD + (WIDE if wide else NARROW)).format(opset=opset)
