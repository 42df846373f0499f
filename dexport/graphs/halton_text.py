"""The text-to-image network of Halton-MaskGIT: tokens of a picture that attend to embeddings of a text.

Source: valeoai/Halton-MaskGIT ``Network/txt_transformer.py`` at f61b0a1. Parameter names and constructor arguments are
theirs; no weights are published. ``dropout`` and initialisation are left out: only training needs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.limits import check_table

NORM_EPS = 1e-6


class MultiheadAttention(nn.Module):
    """Softmax attention of x to y, with the parameters of ``torch.nn.MultiheadAttention``: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x_BTD: Tensor, y_BSD: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q_BNTd, k_BNSd, v_BNSd = (
            F.linear(tokens, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((x_BTD, y_BSD, y_BSD), weights, biases, strict=True)
        )
        out_BNTd = F.scaled_dot_product_attention(q_BNTd, k_BNSd, v_BNSd)
        return self.out_proj(out_BNTd.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """The attention, under the official name."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.mha = MultiheadAttention(dim, heads)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mha(x, y)


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear; dropouts hold the places between them."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Identity(), nn.Linear(mlp_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Attention to itself, attention to the text, MLP: x (B, T, D), text (B, S, cond_dim) -> (B, T, D)."""

    def __init__(self, dim: int, cond_dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(cond_dim, dim), nn.LayerNorm(dim))
        self.ln1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.self_attn = Attention(dim, heads)
        self.ln2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = Attention(dim, heads)
        self.ln3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ff = FeedForward(dim, mlp_dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        own = self.ln1(x)
        x = x + self.self_attn(own, own)
        x = x + self.cross_attn(self.ln2(x), self.mlp(text))
        return x + self.ff(self.ln3(x))


class Encoder(nn.Module):
    """The blocks, under the official name of their list."""

    def __init__(self, dim: int, cond_dim: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim, cond_dim, heads, mlp_dim) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, text)
        return x


class HaltonTextMaskGIT(nn.Module):
    """Logits of every token of a picture, for one that is known in part and a text (official class: ``Transformer``).

    Inputs: codes (B, input_size, input_size) int64 from 0 to ``codebook_size``, which is the mask; text (B, S,
    cond_dim) float32, embeddings; drop_label (B,) bool: whose text is zeros. Output: logits (B, input_size**2,
    codebook_size + 1). The blocks work on squares of ``proj`` x ``proj`` tokens.
    """

    def __init__(
        self,
        input_size: int = 16,
        c: int = 768,
        hidden_dim: int = 768,
        cond_dim: int = 768,
        codebook_size: int = 1024,
        depth: int = 12,
        heads: int = 16,
        mlp_dim: int = 3072,
        dropout: float = 0.0,  # noqa: ARG002 - of training
        proj: int = 1,
    ) -> None:
        super().__init__()
        if min(input_size, c, cond_dim, codebook_size, depth, mlp_dim) < 1:
            raise ValueError("input_size, c, cond_dim, codebook_size, depth and mlp_dim must be at least 1")
        if heads < 1 or hidden_dim % heads:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of heads {heads}")
        if proj < 1 or input_size % proj:
            raise ValueError(f"input_size {input_size} must be a multiple of proj {proj}")
        check_table(input_size, input_size)
        self.input_size, self.proj = input_size, proj
        self.tok_emb = nn.Embedding(codebook_size + 1, c)
        self.pos_emb = nn.Embedding(input_size**2, c)
        self.first_norm = nn.LayerNorm(c, eps=NORM_EPS)
        self.in_proj = nn.Conv2d(c, hidden_dim, kernel_size=proj, stride=proj, bias=False)
        self.transformer = Encoder(hidden_dim, cond_dim, depth, heads, mlp_dim)
        self.out_proj = nn.Sequential(nn.Conv2d(hidden_dim, c * proj**2, 1, bias=False), nn.PixelShuffle(proj))
        self.last_norm = nn.LayerNorm(c, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(1, 1, codebook_size + 1))

    def forward(self, codes: Tensor, text: Tensor, drop_label: Tensor) -> Tensor:
        text = torch.where(drop_label.unflatten(0, (-1, 1, 1)), torch.zeros_like(text), text)
        x = self.first_norm(self.tok_emb(codes.flatten(1)) + self.pos_emb.weight)
        x = self.in_proj(x.transpose(1, 2).unflatten(2, (self.input_size, self.input_size)))
        x = self.transformer(x.flatten(2).transpose(1, 2), text)
        side = self.input_size // self.proj
        x = self.out_proj(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return F.linear(self.last_norm(x), self.tok_emb.weight) + self.bias
