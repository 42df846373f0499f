"""DiffiT, latent space: time-dependent multi-head self-attention with relative position bias (ECCV 2024).

Source: NVlabs/DiffiT ``diffit/diffit.py`` at 9f6f0a5. Parameter names and constructor arguments are theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.dit import NORM_EPS, Mlp, PatchEmbed, unpatchify
from dexport.graphs.layers import LabelEmbedder, TimestepEmbedder, sincos_table
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
    """Norm, SiLU, projection to patches: (B, T, D) -> (B, T, patch_size**2 * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.silu(self.norm_final(x)))


class DiffiT(nn.Module):
    """Latent DiffiT.

    Inputs: x (B, in_channels, input_size, input_size) float32; t (B,) float32 in steps of the original schedule; y (B,)
    int64, ``num_classes`` being the null label. Output: (B, out_channels, input_size, input_size), where
    ``learn_sigma`` doubles the channels. The released models have depth 28; the class and the paper say 30.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 30,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        self.patch_size = patch_size
        self.grid_size = input_size // patch_size
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_table(hidden_size, self.grid_size, self.grid_size), requires_grad=False)
        # One table for all blocks: at 512 px each would take 8 MB.
        index = index_table(self.grid_size)
        self.blocks = nn.ModuleList(
            DiffiTBlock(hidden_size, num_heads, mlp_ratio, self.grid_size, index) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x), self.grid_size, self.patch_size, self.out_channels)
