"""DexTMSA as a TensorRT plugin. Not executed with TensorRT; see :mod:`dexport.plugins.tensorrt_plugin`."""

from __future__ import annotations

from dexport.plugins.tensorrt_plugin import implementation, register_plugin, same_types
from dexport.plugins.tmsa.op import TMSA


def register() -> None:
    """Register ``dexport::DexTMSA``."""

    def describe(qkv, qkv_time, bias_table, num_heads, window):  # noqa: ARG001  the schema
        out = qkv.like()
        out.shape_expr[2] = qkv.shape_expr[2] // 3
        return (out,)

    def tune(qkv, qkv_time, bias_table, outputs):  # noqa: ARG001  the schema
        return same_types("TTTT")

    def implement(qkv, qkv_time, bias_table, num_heads, window, outputs, tactic):  # noqa: ARG001  the schema
        return implementation(TMSA, (qkv, qkv_time, bias_table), {"num_heads": int(num_heads), "window": int(window)})

    register_plugin(TMSA, describe, implement, tune)
