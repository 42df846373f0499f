"""DexTMSA in plain PyTorch, as a custom operator that exporters see as one node.

Source: architectures sheet, DiffiT latent (NVlabs/DiffiT at 9f6f0a5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.plugins.reference import differentiable, restored, widened


def relative_position_index(window: int) -> Tensor:
    """Swin's index of every pair of tokens into the bias table: (window^2, window^2) int64.

    With p(token) = row * (2 * window - 1) + column it is p(query) - p(key) + 2 * window * (window - 1).
    """
    tokens = torch.arange(window * window)
    place = tokens // window * (2 * window - 1) + tokens % window
    return place[:, None] - place[None, :] + 2 * window * (window - 1)


@torch.library.custom_op("dexport::tmsa", mutates_args=())
def tmsa(qkv: Tensor, qkv_time: Tensor, bias_table: Tensor, num_heads: int, window: int) -> Tensor:
    """softmax(q k^T head_dim^-0.5 + bias) v, with q, k, v = qkv + qkv_time.

    Args:
        qkv: (B, T, 3D), packed (3, heads, head_dim), T = window^2.
        qkv_time: (B, 3D), packed alike, added to every token.
        bias_table: (heads, (2 * window - 1)^2): the official table, transposed.
        num_heads: number of heads.
        window: side of the token grid.

    Returns:
        (B, T, D) in the type of ``qkv``, before the output projection. Half precision is computed in float32.
    """
    batch, tokens, width3 = qkv.shape
    packed = widened(qkv) + widened(qkv_time)[:, None, :]
    q, k, v = packed.reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim)
    bias = widened(bias_table)[:, relative_position_index(window).to(qkv.device)]  # (heads, T, T)
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias, dim=-1)
    return restored((weights @ v).transpose(1, 2).reshape(batch, tokens, width3 // 3), qkv)


@tmsa.register_fake
def _fake(qkv: Tensor, _time: Tensor, _table: Tensor, _num_heads: int, _window: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


differentiable(tmsa)
