"""Halton-MaskGIT: a bidirectional transformer over picture tokens (arXiv 2503.17076).

Source: valeoai/Halton-MaskGIT ``Network/transformer.py`` at f61b0a1. Parameter names and constructor arguments are
theirs. ``dropout`` and initialisation are left out: only training needs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.layers import Modulation, modulate
from dexport.limits import check_table

RMS_NORM_EPS = 1e-5
HIDDEN_MULTIPLE = 256


class BiasedRMSNorm(nn.RMSNorm):
    """RMS norm with a bias: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=RMS_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class PlainRMSNorm(nn.Module):
    """RMS norm without a weight: (B, T, D) -> (B, T, D)."""

    ones: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(dim, device="cpu"), persistent=False)  # else the graph makes them anew

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.ones.shape, self.ones, RMS_NORM_EPS)


class Attention(nn.Module):
    """Softmax attention without biases: (B, T, D) -> (B, T, D).

    A head has D // heads channels, so all of them together may have fewer than D. Queries and keys are normalised over
    all heads together, without a weight.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        inner = heads * (dim // heads)
        self.heads = heads
        self.wq = nn.Linear(dim, inner, bias=False)
        self.wk = nn.Linear(dim, inner, bias=False)
        self.wv = nn.Linear(dim, inner, bias=False)
        self.wo = nn.Linear(inner, dim, bias=False)
        self.query_norm = PlainRMSNorm(inner)
        self.key_norm = PlainRMSNorm(inner)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BNTd = self._heads(self.query_norm(self.wq(x_BTD)))
        k_BNTd = self._heads(self.key_norm(self.wk(x_BTD)))
        v_BNTd = self._heads(self.wv(x_BTD))
        out_BNTd = F.scaled_dot_product_attention(q_BNTd, k_BNTd, v_BNTd)
        return self.wo(out_BNTd.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU of two thirds of the width, rounded up to a multiple of 256: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        width = HIDDEN_MULTIPLE * -(-int(2 * mlp_dim / 3) // HIDDEN_MULTIPLE)
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Transformer block modulated by the class: x (B, T, D), c (B, D) -> (B, T, D)."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.mlp = Modulation(dim, 6)
        self.ln1 = nn.RMSNorm(dim, eps=RMS_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ln2 = nn.RMSNorm(dim, eps=RMS_NORM_EPS)
        self.ff = FeedForward(dim, mlp_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self.mlp.tokens(c)
        x = x + gate_attn * self.attn(modulate(self.ln1(x), shift_attn, scale_attn))
        return x + gate_ff * self.ff(modulate(self.ln2(x), shift_ff, scale_ff))


class Encoder(nn.Module):
    """The blocks, under the official name of their list."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim, heads, mlp_dim) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, c)
        return x


class AdaNorm(nn.Module):
    """The last norm, modulated by the class: x (B, T, D), c (B, D) -> (B, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_final = BiasedRMSNorm(dim)
        self.mlp = Modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.mlp.tokens(c)
        return modulate(self.norm_final(x), shift, scale)


class HaltonMaskGIT(nn.Module):
    """Logits of every token of a picture, for one that is known in part (the official class is ``Transformer``).

    Inputs: codes (B, input_size, input_size) int64 from 0 to ``codebook_size``, which is the mask; labels (B,) int64
    from 0 to ``nclass``, which is the null label; drop_label (B,) bool: whose label is the null label. Output: logits
    (B, input_size**2, codebook_size + 1), the mask's included.
    """

    def __init__(
        self,
        input_size: int = 16,
        hidden_dim: int = 768,
        codebook_size: int = 1024,
        depth: int = 12,
        heads: int = 16,
        mlp_dim: int = 3072,
        dropout: float = 0.0,  # noqa: ARG002 - of training
        nclass: int = 1000,
        register: int = 1,
        proj: int = 1,
    ) -> None:
        super().__init__()
        if proj != 1:
            raise ValueError(f"proj {proj}: the official network runs with 1 only")
        for name, value, least in (
            ("input_size", input_size, 1),
            ("codebook_size", codebook_size, 1),
            ("depth", depth, 1),
            ("nclass", nclass, 1),
            ("register", register, 0),
        ):
            if value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        if not 1 <= heads <= hidden_dim:
            raise ValueError(f"heads {heads} must be from 1 to hidden_dim {hidden_dim}")
        if mlp_dim < 2:
            raise ValueError(f"mlp_dim {mlp_dim} must be at least 2")
        check_table(input_size, input_size)
        self.nclass = nclass
        self.cls_emb = nn.Embedding(nclass + 1, hidden_dim)
        self.tok_emb = nn.Embedding(codebook_size + 1, hidden_dim)
        self.pos_emb = nn.Embedding(input_size**2, hidden_dim)
        self.transformer = Encoder(hidden_dim, depth, heads, mlp_dim)
        self.last_norm = AdaNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, codebook_size + 1)
        self.head.weight = self.tok_emb.weight  # checkpoints hold it twice
        self.reg_tokens = nn.Embedding(register, hidden_dim) if register else None

    def forward(self, codes: Tensor, labels: Tensor, drop_label: Tensor) -> Tensor:
        c = self.cls_emb(torch.where(drop_label, self.nclass, labels))
        x = self.tok_emb(codes.flatten(1)) + self.pos_emb.weight
        tokens = x.shape[1]
        if self.reg_tokens is not None:
            registers = self.reg_tokens.weight.expand(x.shape[0], -1, -1)
            x = torch.cat([x, registers], dim=1)
        x = self.transformer(x, c)[:, :tokens]
        return self.head(self.last_norm(x, c))
