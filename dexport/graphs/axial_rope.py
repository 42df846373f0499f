"""Learned axial rotary positions and the norm of queries and keys that goes with them.

Source: qihao067/DiMR ``libs/core/axial_rope.py`` and ``QKNorm`` in ``libs/core/sigmoid/module.py`` at fa141ae, after
k-diffusion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dexport.graphs.rotary import rotate
from dexport.graphs.time_dependent import rms_norm

LARGEST_FREQUENCY = 10.0
LARGEST_SCALE = 100.0


class AxialRoPE(nn.Module):
    """Frequencies per head for the row and for the column of a token.

    x (B, N, T, d) with T = height * width -> (B, N, T, d): of the pairs of features, the first d // 4 turn with the
    row, the next d // 4 with the column; what is left over stays.
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        log_freqs = torch.linspace(math.log(math.pi), math.log(math.pi * LARGEST_FREQUENCY / 2), dim // 4)
        self.freqs_h = nn.Parameter(log_freqs.repeat(n_heads, 1))
        self.freqs_w = nn.Parameter(log_freqs.repeat(n_heads, 1))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        angles = self.angles(height, width)
        turned = 2 * angles.shape[-1]
        return torch.cat([rotate(x[..., :turned], angles.cos(), angles.sin()), x[..., turned:]], dim=-1)

    def angles(self, height: int, width: int) -> Tensor:
        """(N, T, 2 * (d // 4)) float32."""
        longer = max(height, width)
        rows = centres(height, height / longer).reshape(1, height, 1, 1) * self.freqs_h.exp()[:, None, None]
        columns = centres(width, width / longer).reshape(1, 1, width, 1) * self.freqs_w.exp()[:, None, None]
        return torch.cat([rows.expand(-1, -1, width, -1), columns.expand(-1, height, -1, -1)], dim=-1).flatten(1, 2)


class QKNorm(nn.Module):
    """RMS norm of queries or keys (B, N, T, d) with a scale per head, kept as its logarithm and at most 100."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_heads,), math.log(10.0)))

    def forward(self, x: Tensor) -> Tensor:
        log_scale = self.scale.clamp(max=math.log(LARGEST_SCALE))
        return rms_norm(x, torch.exp(0.5 * log_scale - 0.25 * math.log(x.shape[-1])).reshape(-1, 1, 1))


def centres(count: int, reach: float) -> Tensor:
    """The centres (count,) float32 of equal cells that fill [-reach, reach]."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) * (2 * reach / count) - reach
