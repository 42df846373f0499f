"""DexLinearAttention in plain PyTorch, as a custom operator that exporters see as one node.

Source: architectures sheet, LiT (arXiv 2501.12976; own reading, no reference implementation was available).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.plugins.linear_attention.op import EPS
from dexport.plugins.reference import differentiable, restored, widened


@torch.library.custom_op("dexport::linear_attention", mutates_args=())
def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """q' ((k'^T N^-1/2) (v N^-1/2)) / (q' . mean(k') + eps), with q' = relu(q) + eps and k' = relu(k) + eps.

    Args:
        q, k, v: (B, N, D), raw projections, heads side by side.
        num_heads: number of heads.

    Returns:
        (B, N, D) in the type of ``q``, heads merged. Half precision is computed in float32.
    """
    tokens = q.shape[1]
    # (B, heads, N, head_dim)
    q_heads, k_heads, v_heads = (widened(x).unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    q_features, k_features = torch.relu(q_heads) + EPS, torch.relu(k_heads) + EPS
    # The two factors keep k^T v in range; folding them into one 1/N would not.
    state = (k_features.transpose(-2, -1) * tokens**-0.5) @ (v_heads * tokens**-0.5)
    denominator = (q_features * k_features.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True) + EPS
    return restored((q_features @ state / denominator).transpose(1, 2).flatten(2), q)


@linear_attention.register_fake
def _fake(q: Tensor, _k: Tensor, _v: Tensor, _num_heads: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


differentiable(linear_attention)
