"""DexTernaryMatMul as an ONNX function.

ONNX Runtime folds the unpacking into one byte per value when it loads the file, and stops there: it keeps a
``DequantizeLinear`` of a constant. Two of its rewrites would spoil that, and the third axis of the weights keeps both
away: a ``Cast`` in place of the ``DequantizeLinear`` is folded, to four bytes per value; and a two-dimensional one is
fused with the product into ``MatMulNBits``, which rounds the activations to eight bits unless the session says not to.
"""

from __future__ import annotations

BODY = """
<domain: "dexport", opset_import: ["" : {opset}]>
DexTernaryMatMul (ternary_x, ternary_weight, ternary_scale) => (ternary_out)
{{
    axis_0 = Constant <value_ints = [0]> ()
    mask = Constant <value = uint8 {{3}}> ()
    zero_point = Constant <value = uint8 {{1}}> ()
    one_wide = Constant <value_float = 1.0> ()
    one = CastLike (one_wide, ternary_x)
    by_6 = Constant <value = uint8 {{6}}> ()
    by_4 = Constant <value = uint8 {{4}}> ()
    by_2 = Constant <value = uint8 {{2}}> ()
    first = BitShift <direction = "RIGHT"> (ternary_weight, by_6)
    second_high = BitShift <direction = "RIGHT"> (ternary_weight, by_4)
    second = BitwiseAnd (second_high, mask)
    third_high = BitShift <direction = "RIGHT"> (ternary_weight, by_2)
    third = BitwiseAnd (third_high, mask)
    fourth = BitwiseAnd (ternary_weight, mask)
    rows = Concat <axis = 0> (first, second, third, fourth)
    codes = Unsqueeze (rows, axis_0)
    values = DequantizeLinear (codes, one, zero_point)
    columns = Transpose <perm = [0, 2, 1]> (values)
    product = MatMul (ternary_x, columns)
    ternary_out = Mul (product, ternary_scale)
}}
"""


def body(opset: int = 23, _wide: bool = False) -> str:
    """The function's text."""
    return BODY.format(opset=opset)
