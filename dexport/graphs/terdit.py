"""TerDiT: a diffusion transformer with ternary weights (arXiv 2405.14854).

Source: Lucky-Lance/TerDiT ``models.py`` and its ``fairscale`` layers at 825f1f2. Parameter names and constructor
arguments are theirs, apex, flash-attention and the model-parallel layers are plain PyTorch here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.dit import NORM_EPS, unpatchify
from dexport.graphs.layers import LabelEmbedder, TimestepEmbedder, modulate
from dexport.graphs.rotary import rotary_tables, rotate

WIDEST_CONDITION = 1024
TERNARY_EPS = 1e-6


def ternarise(weight: Tensor) -> Tensor:
    """Master weights -> values in {-1, 0, 1}: rounded in units of their mean magnitude over the whole matrix.

    Values that are ternary already stay what they are.
    """
    return (weight / (weight.abs().mean() + TERNARY_EPS)).round().clamp(-1, 1)


class TernaryLinear(nn.Module):
    """Linear layer whose effective weight is ``alphas`` * ``weight``: (B, T, in) -> (B, T, out).

    ``weight`` (out, in) holds values in {-1, 0, 1}, ``alphas`` (1,) their common scale. Checkpoints store master
    weights or four values per byte; both become this when they are opened.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.alphas = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight) * self.alphas
        return out if self.bias is None else out + self.bias


class Attention(nn.Module):
    """Softmax attention with rotary positions and grouped key/value heads: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        kv_dim = dim // n_heads * n_kv_heads
        self.wq = TernaryLinear(dim, dim)
        self.wk = TernaryLinear(dim, kv_dim)
        self.wv = TernaryLinear(dim, kv_dim)
        self.wo = TernaryLinear(dim, dim)
        self.q_norm = nn.LayerNorm(dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(kv_dim) if qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        q_BNTd = rotate(self._heads(self.q_norm(self.wq(x_BTD)), self.n_heads), cos_Td, sin_Td)
        k_BNTd = rotate(self._heads(self.k_norm(self.wk(x_BTD)), self.n_kv_heads), cos_Td, sin_Td)
        v_BNTd = self._heads(self.wv(x_BTD), self.n_kv_heads)
        groups = self.n_heads // self.n_kv_heads
        if groups > 1:
            k_BNTd, v_BNTd = (x.repeat_interleave(groups, dim=1) for x in (k_BNTd, v_BNTd))
        out_BNTd = F.scaled_dot_product_attention(q_BNTd, k_BNTd, v_BNTd)
        return self.wo(out_BNTd.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor, heads: int) -> Tensor:
        return x_BTD.unflatten(2, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = TernaryLinear(dim, hidden_dim)
        self.w2 = TernaryLinear(hidden_dim, dim)
        self.w3 = TernaryLinear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """adaLN block whose modulation is normalised: x (B, T, D), c (B, min(D, 1024)) -> (B, T, D)."""

    def __init__(self, dim: int, attention: Attention, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(),
            TernaryLinear(min(dim, WIDEST_CONDITION), 6 * dim, bias=True),
            nn.RMSNorm(6 * dim, eps=norm_eps),
        )

    def forward(self, x: Tensor, c: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c.unsqueeze(1)).chunk(
            6, dim=2
        )
        attended = self.attention(modulate(self.attention_norm(x), shift_attn, scale_attn), cos_Td, sin_Td)
        x = x + gate_attn * attended
        return x + gate_mlp * self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches, in full precision: (B, T, D) -> (B, T, p * p * out_channels)."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, WIDEST_CONDITION), 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TerDiT(nn.Module):
    """Ternary diffusion transformer (the official class is ``DiT_Llama``).

    Inputs: x (B, in_channels, input_size, input_size) float32; t (B,) float32 in steps of the original schedule;
    y (B,) int64, ``num_classes`` being the null label. Output: (B, out_channels, input_size, input_size), where
    ``learn_sigma`` doubles the channels.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        dim: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if n_layers < 1:
            raise ValueError(f"n_layers {n_layers} must be at least 1")
        if dim % (2 * n_heads):
            raise ValueError(f"dim {dim} must be a multiple of twice n_heads {n_heads}: rotary positions turn pairs")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads} must be a multiple of n_kv_heads {n_kv_heads}")
        self.patch_size = patch_size
        self.grid_size = input_size // patch_size
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        hidden_dim = feed_forward_width(dim, multiple_of, ffn_dim_multiplier)
        condition = min(dim, WIDEST_CONDITION)

        self.x_embedder = nn.Linear(patch_size * patch_size * in_channels, dim)
        self.t_embedder = TimestepEmbedder(condition)
        self.y_embedder = LabelEmbedder(num_classes, condition, class_dropout_prob)
        self.layers = nn.ModuleList(
            TransformerBlock(dim, Attention(dim, n_heads, n_kv_heads, qk_norm), hidden_dim, norm_eps)
            for _ in range(n_layers)
        )
        self.final_layer = FinalLayer(dim, patch_size, self.out_channels)
        cos, sin = rotary_tables(dim // n_heads, self.grid_size**2)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # Features of a patch in the order (C, row, column), which is that of pixel_unshuffle.
        x = self.x_embedder(F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2))
        c = self.t_embedder(t) + self.y_embedder(y)
        for layer in self.layers:
            x = layer(x, c, self.cos, self.sin)
        return unpatchify(self.final_layer(x, c), self.grid_size, self.patch_size, self.out_channels)


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of 4 * dim, scaled, rounded up to a multiple."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of
