"""Norms of DiMR, most of them with parameters that depend on time.

Source: qihao067/DiMR ``libs/core/sigmoid/`` at fa141ae. There the norm parameters of all modules are computed before
the forward and kept as module state, once for a whole batch whose times are equal. Here every norm computes its own,
one row per sample: the values are the same and the graph does not depend on data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_SNR_UNIT = 4.0
LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-8
ADAPTIVE_EPS = 1e-6


class TimeDependentParameter(nn.Module):
    """A vector that moves from ``param1`` to ``param0`` with time: log_snr (B,) -> (B, dim).

    ``nodecay_weight`` is stored less 1.
    """

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), value))
        self.param1 = nn.Parameter(torch.full((dim,), value))
        self.nodecay_weight = nn.Parameter(torch.zeros(dim))
        self.nodecay_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, log_snr: Tensor) -> Tensor:
        time_B1 = (log_snr / LOG_SNR_UNIT).unsqueeze(1)
        share_BD = torch.sigmoid(time_B1 * (self.nodecay_weight + 1) + self.nodecay_bias)
        return self.param1 + share_BD * (self.param0 - self.param1)


class TimeDependentLayerNorm(nn.Module):
    """LayerNorm with time-dependent weight and bias: x (B, ..., dim), log_snr (B,) -> (B, ..., dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = TimeDependentParameter(dim, 1.0)
        self.bias = TimeDependentParameter(dim, 0.0)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return normed * per_sample(self.weight(log_snr), x) + per_sample(self.bias(log_snr), x)


class RMSNorm(nn.Module):
    """x / (rms + eps) * scale, with eps outside the root: x (B, ..., dim) -> (B, ..., dim). Time is ignored."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, _log_snr: Tensor) -> Tensor:
        return over_rms(x) * self.scale


class TimeDependentRMSNorm(nn.Module):
    """x / (rms + eps) * scale(t): x (B, ..., dim), log_snr (B,) -> (B, ..., dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = TimeDependentParameter(dim, 1.0)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return over_rms(x) * per_sample(self.scale(log_snr), x)


class AdaptiveRMSNorm(nn.Module):
    """RMS norm whose scale comes from the first token, or from the first row of a grid: (B, ..., dim) -> same.

    That token is the class, where the branch has one. Time is ignored.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, _log_snr: Tensor) -> Tensor:
        return rms_norm(x, self.linear(x[:, :1]) + 1)


NORMS = {
    "LN": TimeDependentLayerNorm,
    "RMSN": RMSNorm,
    "TDRMSN": TimeDependentRMSNorm,
    "ADARMSN": AdaptiveRMSNorm,
}
"""By the names of ``norm_type``."""


def make_norm(norm_type: str, dim: int) -> nn.Module:
    """Raises ValueError for a kind that there is not."""
    if norm_type not in NORMS:
        raise ValueError(f"norm_type {norm_type!r} is none of {', '.join(NORMS)}")
    return NORMS[norm_type](dim)


def per_sample(vector_BD: Tensor, x: Tensor) -> Tensor:
    """(B, D) -> (B, 1, ..., 1, D), to go with x (B, ..., D)."""
    for _ in range(x.ndim - 2):
        vector_BD = vector_BD.unsqueeze(1)
    return vector_BD


def over_rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True).sqrt() + RMS_NORM_EPS)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale / sqrt(mean square + eps)."""
    return x * (scale * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + ADAPTIVE_EPS))
