"""The published shapes, and what each op has to move and compute at the least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dexport.plugins.channel_attention.op import CHANNEL_ATTENTION
from dexport.plugins.linear_attention.op import LINEAR_ATTENTION
from dexport.plugins.op import Dims, Op
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL
from dexport.plugins.tmsa.op import TMSA


@dataclass(frozen=True)
class Problem:
    """One op at one shape.

    Attributes:
        bytes_moved: every input read once and every output written once, in half precision.
        flops: multiply-adds count twice; elementwise work is left out.
    """

    name: str
    op: Op
    shapes: tuple[tuple[int, ...], ...]
    attributes: Mapping[str, int]
    bytes_moved: int
    flops: int

    @property
    def dims(self) -> Dims:
        return self.op.dims(self.shapes, self.attributes)


def size(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def tmsa_problem(name: str, batch: int, window: int, heads: int = 16, head_dim: int = 72) -> Problem:
    tokens, width = window * window, heads * head_dim
    shapes = ((batch, tokens, 3 * width), (batch, 3 * width), (heads, (2 * window - 1) ** 2))
    moved = 2 * (sum(map(size, shapes)) + batch * tokens * width)
    attributes = {"num_heads": heads, "window": window}
    return Problem(name, TMSA, shapes, attributes, moved, 4 * batch * tokens * tokens * width)


def linear_problem(name: str, batch: int, tokens: int, width: int = 1152, heads: int = 4) -> Problem:
    shape = (batch, tokens, width)
    flops = 4 * batch * tokens * width * (width // heads)
    return Problem(name, LINEAR_ATTENTION, (shape,) * 3, {"num_heads": heads}, 2 * 4 * size(shape), flops)


def channel_problem(name: str, batch: int, channels: int, side: int) -> Problem:
    shapes = ((batch, channels, side, side), (channels, channels, 1, 1), (channels,))
    moved = 2 * (2 * size(shapes[0]) + size(shapes[1]) + channels)
    flops = 2 * batch * channels * channels
    return Problem(name, CHANNEL_ATTENTION, shapes, {}, moved, flops)


def ternary_problem(name: str, batch: int, tokens: int, width: int, columns: int) -> Problem:
    shapes = ((batch, tokens, width), (columns // 4, width), (1,))
    moved = 2 * batch * tokens * (width + columns) + columns * width // 4
    return Problem(name, TERNARY_MATMUL, shapes, {}, moved, 2 * batch * tokens * width * columns)


def published(batch: int) -> tuple[Problem, ...]:
    """DiffiT 256 and 512, LiT-XL/2 at 256 to 2048 px, DiCo-XL's three levels at 256 px, TerDiT's two sizes."""
    return (
        tmsa_problem("diffit-256", batch, 16),
        tmsa_problem("diffit-512", batch, 32),
        *(linear_problem(f"lit-xl-{side * 16}", batch, side * side) for side in (16, 32, 64, 128)),
        *(channel_problem(f"dico-xl-{c}x{s}x{s}", batch, c, s) for c, s in ((416, 32), (832, 16), (1664, 8))),
        channel_problem("dico-s-512x8x8", batch, 512, 8),
        ternary_problem("terdit-600m-attention-256", batch, 256, 1536, 1536),
        ternary_problem("terdit-4.2b-feed-forward-512", batch, 1024, 3072, 8192),
    )
