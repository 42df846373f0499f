"""LiT: DiT with linear attention in place of every softmax attention (ICCV 2025, arXiv 2501.12976).

An OWN READING: the official repository could not be obtained and no reference output exists. The attention follows a
public copy with the key names q, kv, dwc and proj; there the depthwise convolution has head_dim channels, which all
heads share. Everything else is DiT.
"""

from __future__ import annotations

from torch import Tensor, nn

from dexport.graphs.dit import DiT, DiTBlock
from dexport.plugins.linear_attention.reference import linear_attention

DEPTHWISE_KERNEL = 5


class LinearAttention(nn.Module):
    """ReLU linear attention plus a depthwise convolution of the values: (B, T, D) -> (B, T, D), T a square grid."""

    def __init__(self, hidden_size: int, num_heads: int, grid_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.head_dim = hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.dwc = nn.Conv2d(
            self.head_dim, self.head_dim, DEPTHWISE_KERNEL, padding=DEPTHWISE_KERNEL // 2, groups=self.head_dim
        )
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=2)
        out = linear_attention(self.q(x), k, v, self.num_heads)
        return self.proj(out + self._local(v))

    def _local(self, v_BTD: Tensor) -> Tensor:
        """The depthwise branch; heads join the batch, because they share the weights."""
        tokens, width = v_BTD.shape[1:]
        planes = v_BTD.transpose(1, 2).reshape(-1, self.head_dim, self.grid_size, self.grid_size)
        return self.dwc(planes).reshape(-1, width, tokens).transpose(1, 2)


class LiT(DiT):
    """Arguments, inputs and outputs of :class:`~dexport.graphs.dit.DiT`."""

    def block(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        return DiTBlock(hidden_size, LinearAttention(hidden_size, num_heads, self.grid_size), mlp_ratio)
