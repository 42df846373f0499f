"""The two parts of DexChannelAttention as TensorRT plugins; the whole op stays a function that contains them.

Not executed with TensorRT; see :mod:`dexport.plugins.tensorrt_plugin`.
"""

from __future__ import annotations

from dexport.optional import optional_import
from dexport.plugins.channel_attention.op import POOL, SCALE
from dexport.plugins.tensorrt_plugin import implementation, register_plugin, same_types


def register() -> None:
    """Register ``dexport::DexChannelAttentionPool`` and ``dexport::DexChannelAttentionScale``."""
    register_pool()
    register_scale()


def register_pool() -> None:
    def describe(x):
        shape = (x.shape_expr[0], x.shape_expr[1])
        float32 = optional_import("tensorrt").float32
        return (optional_import("tensorrt.plugin").from_shape_expr(shape, dtype=float32),)

    def tune(x, outputs):  # noqa: ARG001  the schema
        return same_types(["T", "FP32"])

    def implement(x, outputs, tactic):  # noqa: ARG001  the schema
        return implementation(POOL, (x,), {})

    register_plugin(POOL, describe, implement, tune)


def register_scale() -> None:
    def describe(x, pooled, weight, bias):  # noqa: ARG001  the schema
        return (x.like(),)

    def tune(x, pooled, weight, bias, outputs):  # noqa: ARG001  the schema
        return same_types(["T", "FP32", "T", "T", "T"])

    def implement(x, pooled, weight, bias, outputs, tactic):  # noqa: ARG001  the schema
        return implementation(SCALE, (x, pooled, weight, bias), {})

    register_plugin(SCALE, describe, implement, tune)
