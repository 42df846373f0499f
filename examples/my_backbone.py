"""A backbone of one's own, from scratch: ``dexport build examples/my_backbone.py``.

A small U-Net on 32 px grey images in ten classes, for rectified flow. ``docs/your-own-backbone.md`` walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.exporter.recipes.recipe import BATCH, Guidance, Islands, Recipe, Sampling, Signature, TensorSpec


# --8<-- [start:model]
class Waves(nn.Module):
    """Time as cosines and sines: t (B,) -> (B, 2 * count)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        # A table that is not in the state dict: device="cpu" keeps its values when the network is made without memory.
        self.register_buffer("freqs", torch.pi * torch.arange(1, count + 1, device="cpu"), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.unsqueeze(1) * self.freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    """Residual convolutions under a condition: x (B, C, H, W), c (B, D) -> (B, C, H, W)."""

    def __init__(self, width: int, cond: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.modulation = nn.Linear(cond, 2 * width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c).unflatten(1, (-1, 1, 1)).chunk(2, dim=1)
        return x + self.conv2(F.silu(self.conv1(self.norm(x) * (1 + scale) + shift)))


class SmallUNet(nn.Module):
    """Inputs: x (B, channels, H, W), t (B,) in [0, 1], y (B,) int64. Output: the velocity, shaped like x."""

    def __init__(self, channels: int = 1, width: int = 32, cond: int = 128, num_classes: int = 10) -> None:
        super().__init__()
        self.time = nn.Sequential(Waves(32), nn.Linear(64, cond))
        self.label = nn.Embedding(num_classes + 1, cond)  # the last row is the null label
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.before = Block(width, cond)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.middle = Block(2 * width, cond)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.after = Block(width, cond)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = F.silu(self.time(t) + self.label(y))
        x = self.before(self.first(x), c)
        x = self.after(x + self.up(self.middle(self.down(x), c)), c)
        return self.last(x)


# --8<-- [end:model]
# --8<-- [start:signature]
def signature(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
    """x, t, y -> out."""
    image = (BATCH, config["channels"], *size)
    return Signature(
        inputs=(
            TensorSpec("x", "float32", image),
            TensorSpec("t", "float32", (BATCH,), "stratified", 0.0, 1.0),
            TensorSpec("y", "int64", (BATCH,), "integers", 0, config["num_classes"] - 1),
        ),
        outputs=(TensorSpec("out", "float32", image),),
    )


# --8<-- [end:signature]
# --8<-- [start:recipe]
RECIPE = Recipe(
    name="small-unet",
    family="SmallUNet",
    summary="U-Net for rectified flow, 32 px grey images, 10 classes",
    source="examples/my_backbone.py",
    constructor=SmallUNet,
    config={"channels": 1, "width": 32, "cond": 128, "num_classes": 10},
    signature=signature,
    latent=(32, 32),
    latent_multiple=2,  # it halves the resolution once
    pixels_per_latent=1,  # it works on pixels
    checkpoints=("small-unet.safetensors",),
    islands=Islands(modules=("time",), ops=(*Islands().ops, "GroupNormalization")),
    sampling=Sampling(
        schedule="rectified flow",
        prediction="velocity",
        sampler="flow",
        steps=25,
        latent_scale=1.0,
        decoder="none",
    ),
    guidance=Guidance("all channels", default_scale=2.0, null_label=lambda config: config["num_classes"]),
)
# --8<-- [end:recipe]
