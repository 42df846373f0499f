"""DiT: scalable diffusion models with transformers (arXiv 2212.09748).

Source: facebookresearch/DiT ``models.py`` at ed81ce2. Parameter names and constructor arguments are theirs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.layers import LabelEmbedder, Modulation, TimestepEmbedder, modulate, sincos_table

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head softmax attention with one packed qkv projection: (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        packed = self.qkv(x_BTD).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
        q_BNTd, k_BNTd, v_BNTd = packed.chunk(3, dim=1)
        out_BNTd = F.scaled_dot_product_attention(q_BNTd, k_BNTd, v_BNTd)
        return self.proj(out_BNTd.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: x (B, T, D), c (B, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, attention: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = Modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation.tokens(c)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, T, D) -> (B, T, patch_size**2 * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = Modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation.tokens(c)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer.

    Inputs: x (B, in_channels, input_size, input_size) float32; t (B,) float32 in steps of the original
    schedule; y (B,) int64, ``num_classes`` being the null label. Output: (B, out_channels, input_size,
    input_size), where ``learn_sigma`` doubles the channels.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if depth < 1:
            raise ValueError(f"depth {depth} must be at least 1")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        self.patch_size = patch_size
        self.grid_size = input_size // patch_size
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A fixed table, but one that the state dict carries.
        self.pos_embed = nn.Parameter(sincos_table(hidden_size, self.grid_size, self.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(self.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = self.final(hidden_size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.grid_size, self.patch_size, self.out_channels)

    def block(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        """One block, called with (x, c): relatives of DiT put theirs here."""
        return DiTBlock(hidden_size, Attention(hidden_size, num_heads), mlp_ratio)

    def final(self, hidden_size: int) -> nn.Module:
        """What turns tokens into patches, called with (x, c)."""
        return FinalLayer(hidden_size, self.patch_size, self.out_channels)


def unpatchify(x: Tensor, grid: int, patch: int, channels: int) -> Tensor:
    """(B, T, p*p*C) in the order (row, column, C) inside a patch -> (B, C, H, W)."""
    x = x.reshape(-1, grid, grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, grid * patch, grid * patch)
