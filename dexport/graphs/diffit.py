"""DiffiT, latent space: time-dependent multi-head self-attention with relative position bias (ECCV 2024).

Source: NVlabs/DiffiT ``diffit/diffit.py`` at 9f6f0a5. Parameter names and constructor arguments are theirs.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.dit import NORM_EPS, DiT, Mlp
from dexport.plugins.tmsa.reference import relative_position_index, tmsa


class TMSA(nn.Module):
    """Time-dependent self-attention over one window that covers the whole grid.

    x (B, T, D) with T = window^2, c (B, D) -> (B, T, D): qkv(x) + qkv_temb(c), softmax attention with relative
    position bias, projection.
    """

    def __init__(self, hidden_size: int, num_heads: int, window: int, index: Tensor) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.qkv_temb = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        # In official checkpoints, but never read here: the op computes the index from the window.
        self.register_buffer("relative_position_index", index)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        table = self.relative_position_bias_table.transpose(0, 1)
        return self.proj(tmsa(self.qkv(x), self.qkv_temb(c), table, self.num_heads, self.window))


def index_table(window: int) -> Tensor:
    """The relative position index with real values, also where modules are built on the meta device."""
    with torch.device("cpu"):
        return relative_position_index(window)


class DiffiTBlock(nn.Module):
    """Pre-norm transformer block; time and label enter through the attention only: (B, T, D), (B, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, window: int, index: Tensor) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = TMSA(hidden_size, num_heads, window, index)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Norm, SiLU, projection to patches; no condition: (B, T, D) -> (B, T, patch_size**2 * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        return self.linear(F.silu(self.norm_final(x)))


class DiffiT(DiT):
    """Latent DiffiT. Arguments, inputs and outputs of :class:`~dexport.graphs.dit.DiT`.

    The released models have depth 28; the official class and the paper say 30.
    """

    @cached_property
    def index(self) -> Tensor:
        """One table for all blocks: at 512 px each would take 8 MB."""
        return index_table(self.grid_size)

    def block(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        return DiffiTBlock(hidden_size, num_heads, mlp_ratio, self.grid_size, self.index)

    def final(self, hidden_size: int) -> nn.Module:
        return FinalLayer(hidden_size, self.patch_size, self.out_channels)
