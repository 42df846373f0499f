"""DexTernaryMatMul as a TensorRT plugin.

Not executed with TensorRT; see :mod:`dexport.plugins.tensorrt_plugin`.
"""

from __future__ import annotations

from dexport.optional import optional_import
from dexport.plugins.tensorrt_plugin import implementation, register_plugin, same_types
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL


def register() -> None:
    """Register ``dexport::DexTernaryMatMul``."""

    def describe(x, weight, scale):  # noqa: ARG001  the schema
        shape = (x.shape_expr[0], x.shape_expr[1], weight.shape_expr[0] * 4)
        return (optional_import("tensorrt.plugin").from_shape_expr(shape, dtype=x.dtype),)

    def tune(x, weight, scale, outputs):  # noqa: ARG001  the schema
        return same_types(["T", "UINT8", "T", "T"])

    def implement(x, weight, scale, outputs, tactic):  # noqa: ARG001  the schema
        return implementation(TERNARY_MATMUL, (x, weight, scale), {})

    register_plugin(TERNARY_MATMUL, describe, implement, tune)
