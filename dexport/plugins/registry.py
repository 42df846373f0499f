"""Every custom op, by name."""

from __future__ import annotations

from dexport.errors import UsageError
from dexport.plugins.channel_attention.op import CHANNEL_ATTENTION, POOL, SCALE
from dexport.plugins.linear_attention.op import LINEAR_ATTENTION
from dexport.plugins.op import Op
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL
from dexport.plugins.tmsa.op import TMSA


def all_ops() -> tuple[Op, ...]:
    """The ops in the order that a model's functions need: a part before what contains it."""
    return (TMSA, LINEAR_ATTENTION, POOL, SCALE, CHANNEL_ATTENTION, TERNARY_MATMUL)


def find_op(name: str) -> Op:
    """The op of that name; a :class:`~dexport.errors.UsageError` lists the names."""
    for op in all_ops():
        if op.name == name:
            return op
    raise UsageError(f"there is no op {name}", hint=f"the ops are {', '.join(op.name for op in all_ops())}")
