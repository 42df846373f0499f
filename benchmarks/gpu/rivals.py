"""What the kernels are compared with: eager PyTorch in the input type, and scaled dot product attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dexport.plugins.linear_attention.op import EPS
from dexport.plugins.ternary_matmul.packing import unpack
from dexport.plugins.tmsa.reference import relative_position_index


def tmsa_parts(qkv: Tensor, time: Tensor, table: Tensor, num_heads: int, window: int) -> tuple[Tensor, ...]:
    """q, k, v (B, heads, T, head_dim) and the bias (heads, T, T)."""
    batch, tokens, _ = qkv.shape
    packed = (qkv + time[:, None, :]).reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return (*packed, table[:, relative_position_index(window).to(qkv.device)])


def eager_tmsa(qkv: Tensor, time: Tensor, table: Tensor, num_heads: int, window: int) -> Tensor:
    """As the official code writes it."""
    q, k, v, bias = tmsa_parts(qkv, time, table, num_heads, window)
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def sdpa_tmsa(qkv: Tensor, time: Tensor, table: Tensor, num_heads: int, window: int) -> Tensor:
    """PyTorch's fused attention with the bias as a mask of heads x T x T."""
    q, k, v, bias = tmsa_parts(qkv, time, table, num_heads, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def eager_linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """float32 inside, as the authors run it."""
    half, tokens = q.dtype, q.shape[1]
    q, k, v = (x.float().unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k = torch.relu(q) + EPS, torch.relu(k) + EPS
    state = (k.transpose(-2, -1) * tokens**-0.5) @ (v * tokens**-0.5)
    denominator = q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) + EPS
    return (q @ state / denominator).transpose(1, 2).flatten(2).to(half)


def sdpa_linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The softmax attention that linear attention replaces, with DiT-XL's 16 heads: a different result."""
    heads = 4 * num_heads
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def eager_channel_attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As the official code writes it."""
    return x * torch.sigmoid(F.conv2d(x.mean(dim=(2, 3), keepdim=True), weight, bias))


def eager_ternary_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As the official code writes it: unpacked in every call."""
    return F.linear(x, unpack(weight).to(x.dtype)) * scale


EAGER: Mapping[str, Callable[..., Any]] = {
    "DexTMSA": eager_tmsa,
    "DexLinearAttention": eager_linear_attention,
    "DexChannelAttention": eager_channel_attention,
    "DexTernaryMatMul": eager_ternary_matmul,
}
SDPA: Mapping[str, Callable[..., Any]] = {
    "DexTMSA": sdpa_tmsa,
    "DexLinearAttention": sdpa_linear_attention,
}
COMPUTES_SOMETHING_ELSE = frozenset({("DexLinearAttention", "sdpa")})
"""Compared in time only."""
