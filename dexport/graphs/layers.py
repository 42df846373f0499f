"""Layers shared by DiT, DiCo and their relatives.

Source: facebookresearch/DiT ``models.py``, shallowdream204/DiCo ``dico_models.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dexport.limits import check_table

FREQUENCY_EMBEDDING_SIZE = 256
MAX_PERIOD = 10_000.0


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep features (cosines first) through a two-layer MLP.

    Input: t (B,) float, in steps of the original schedule, may be fractional. Output: (B, hidden_size).
    """

    freqs: Tensor

    def __init__(self, hidden_size: int, frequency_embedding_size: int = FREQUENCY_EMBEDDING_SIZE) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        half = frequency_embedding_size // 2
        exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        self.register_buffer("freqs", torch.exp(exponents), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles_BF = t.unsqueeze(1).float() * self.freqs
        return self.mlp(torch.cat([angles_BF.cos(), angles_BF.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Class embedding; with label dropout in training the last row is the null label.

    Input: y (B,) int64. Output: (B, hidden_size).
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Modulation(nn.Sequential):
    """adaLN modulation vectors: SiLU then Linear; the state-dict key of the Linear is ``1``.

    Input: c (B, D). Output of ``tokens``: ``count`` tensors (B, 1, D); of ``pixels``: ``count`` tensors (B, D, 1, 1).
    """

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, count * hidden_size))
        self.count = count

    def tokens(self, c: Tensor) -> tuple[Tensor, ...]:
        return self(c).unsqueeze(1).chunk(self.count, dim=2)

    def pixels(self, c: Tensor) -> tuple[Tensor, ...]:
        return self(c).unflatten(1, (-1, 1, 1)).chunk(self.count, dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, broadcast over tokens or pixels."""
    return x * (1 + scale) + shift


def sincos_table(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, (1, height*width, dim) float32.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos].
    Source: DiT ``get_2d_sincos_pos_embed`` (after MAE).
    """
    check_table(dim, height, width)
    omega = 1.0 / MAX_PERIOD ** (torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim / 4.0))
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device="cpu") for n in (height, width)), indexing="ij"
    )
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)
