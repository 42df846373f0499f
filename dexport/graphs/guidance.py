"""Classifier-free guidance as the systems apply it, fused into one graph.

The batch is doubled inside: [conditional half, null half].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Guided(nn.Module):
    """null + s(t) * (cond - null) on the first output channels; the rest keeps the conditional prediction.

    Three channels is what DiT, DiCo, DiffiT and TerDiT sample with, all what DiMR does. Source: ``forward_with_cfg`` of
    facebookresearch/DiT (commit ed81ce2), shallowdream204/DiCo and, for the power, NVlabs/DiffiT (commit 9f6f0a5);
    ``eval.py`` of qihao067/DiMR (commit fa141ae).

    Inputs: x (B, C, H, W), t (B,), y (B,) int64, cfg_scale () float32. Output: (B, C_out, H, W), which is
    the conditional half of the official result.

    Args:
        channels: how many are guided; None for all.
        power: p of s(t) = (cfg_scale - 1) * (1 - cos(pi * (1 - t/1000)^p)) / 2 + 1 per sample, which grows from 1 at
            the noisiest step to cfg_scale at the last; None for s(t) = cfg_scale.
        clock: t at the clean and at the noisy end; for others than (0, 1000), t/1000 above is the place between them.
    """

    def __init__(
        self,
        model: nn.Module,
        null_label: int,
        channels: int | None = 3,
        power: float | None = None,
        clock: tuple[float, float] = (0.0, 1000.0),
    ) -> None:
        super().__init__()
        self.model = model
        self.null_label = null_label
        self.channels = channels
        self.power = power
        self.clean, self.noisy = clock

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: Tensor) -> Tensor:
        null_y = torch.full_like(y, self.null_label)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null_y]))
        batch = x.shape[0]
        cond, null = both[:batch], both[batch:]
        if self.channels is None:
            return null + self.scale(t, cfg_scale) * (cond - null)
        guided_cond, rest = cond[:, : self.channels], cond[:, self.channels :]
        guided_null = null[:, : self.channels]
        return torch.cat([guided_null + self.scale(t, cfg_scale) * (guided_cond - guided_null), rest], dim=1)

    def scale(self, t: Tensor, cfg_scale: Tensor) -> Tensor:
        """Guidance strength, broadcastable to (B, C, H, W)."""
        if self.power is None:
            return cfg_scale
        progress = ((self.noisy - t) / (self.noisy - self.clean)) ** self.power
        strength = (cfg_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2 + 1
        return strength.reshape(-1, 1, 1, 1)
