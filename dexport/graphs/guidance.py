"""Classifier-free guidance as the systems apply it, fused into one graph.

The batch is doubled inside: [conditional half, null half].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FirstChannelsGuidance(nn.Module):
    """Guidance on the first output channels only: three of them as DiT, DiCo, DiffiT and TerDiT sample.

    The remaining channels keep the conditional prediction. Source: ``forward_with_cfg`` of
    facebookresearch/DiT (commit ed81ce2) and shallowdream204/DiCo.

    Inputs: x (B, C, H, W), t (B,), y (B,) int64, cfg_scale () float32. Output: (B, C_out, H, W), which is
    the conditional half of the official result.
    """

    def __init__(self, model: nn.Module, null_label: int, channels: int = 3) -> None:
        super().__init__()
        self.model = model
        self.null_label = null_label
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: Tensor) -> Tensor:
        null_y = torch.full_like(y, self.null_label)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null_y]))
        batch = x.shape[0]
        cond, null = both[:batch], both[batch:]
        guided_cond, rest = cond[:, : self.channels], cond[:, self.channels :]
        guided_null = null[:, : self.channels]
        return torch.cat([guided_null + self.scale(t, cfg_scale) * (guided_cond - guided_null), rest], dim=1)

    def scale(self, _t: Tensor, cfg_scale: Tensor) -> Tensor:
        """Guidance strength, broadcastable to (B, C, H, W); constant over the schedule here."""
        return cfg_scale


class PowerCosineGuidance(FirstChannelsGuidance):
    """Strength that grows from 1 at the noisiest step to cfg_scale at the last, as DiffiT samples at 256 px.

    s(t) = (cfg_scale - 1) * (1 - cos(pi * (1 - t/1000)^4)) / 2 + 1 per sample. Source: ``forward_with_cfg`` of
    NVlabs/DiffiT (commit 9f6f0a5) with its default power and number of steps.
    """

    steps = 1000.0
    power = 4.0

    def scale(self, t: Tensor, cfg_scale: Tensor) -> Tensor:
        progress = (1 - t / self.steps) ** self.power
        strength = (cfg_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2 + 1
        return strength.reshape(-1, 1, 1, 1)
