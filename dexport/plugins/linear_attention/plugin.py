"""DexLinearAttention as a TensorRT plugin: the one-kernel form, because a plugin is one kernel.

Not executed with TensorRT; see :mod:`dexport.plugins.tensorrt_plugin`.
"""

from __future__ import annotations

from dexport.plugins.linear_attention.op import LINEAR_ATTENTION
from dexport.plugins.tensorrt_plugin import implementation, register_plugin, same_types


def register() -> None:
    """Register ``dexport::DexLinearAttention``."""

    def describe(q, k, v, num_heads):  # noqa: ARG001  the schema
        return (q.like(),)

    def tune(q, k, v, outputs):  # noqa: ARG001  the schema
        return same_types("TTTT")

    def implement(q, k, v, num_heads, outputs, tactic):  # noqa: ARG001  the schema
        return implementation(LINEAR_ATTENTION, (q, k, v), {"num_heads": int(num_heads)})

    register_plugin(LINEAR_ATTENTION, describe, implement, tune)
