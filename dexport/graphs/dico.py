"""DiCo: a fully convolutional, three-level diffusion backbone (NeurIPS 2025).

Source: shallowdream204/DiCo ``dico_models.py`` at b596b05. Parameter names and constructor arguments are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.layers import Modulation, TimestepEmbedder, modulate
from dexport.plugins.channel_attention.reference import channel_attention

NORM_EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), without affine parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.ModuleDict):
    """x * sigmoid(1x1 convolution of the global average): (B, C, H, W) -> (B, C, H, W).

    Officially a Sequential of pool, convolution and sigmoid, hence the state-dict key ``1`` of the convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__({"1": nn.Conv2d(channels, channels, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return channel_attention(x, self["1"].weight, self["1"].bias)


class LabelEmbedder3(nn.Module):
    """One class table per level width. Input: y (B,) int64. Output: three tensors (B, width)."""

    def __init__(self, num_classes: int, widths: Sequence[int], dropout_prob: float) -> None:
        super().__init__()
        rows = num_classes + int(dropout_prob > 0)
        self.embedding_table_0 = nn.Embedding(rows, widths[0])
        self.embedding_table_1 = nn.Embedding(rows, widths[1])
        self.embedding_table_2 = nn.Embedding(rows, widths[2])

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedding_table_0(y), self.embedding_table_1(y), self.embedding_table_2(y)


class DiCoBlock(nn.Module):
    """Convolution block with compact channel attention and adaLN: x (B, C, H, W), c (B, C) -> (B, C, H, W)."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        ffn_channels = int(mlp_ratio * hidden_size)
        self.conv1 = nn.Conv2d(hidden_size, hidden_size, 1)
        self.conv2 = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)
        self.conv3 = nn.Conv2d(hidden_size, hidden_size, 1)
        self.ca = ChannelAttention(hidden_size)
        self.conv4 = nn.Conv2d(hidden_size, ffn_channels, 1)
        self.conv5 = nn.Conv2d(ffn_channels, hidden_size, 1)
        self.norm1 = ChannelNorm(hidden_size)
        self.norm2 = ChannelNorm(hidden_size)
        self.adaLN_modulation = Modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_conv, scale_conv, gate_conv, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation.pixels(c)
        h = modulate(self.norm1(x), shift_conv, scale_conv)
        h = F.gelu(self.conv2(self.conv1(h)))
        x = x + gate_conv * self.conv3(self.ca(h))
        h = modulate(self.norm2(x), shift_mlp, scale_mlp)
        return x + gate_mlp * self.conv5(F.gelu(self.conv4(h)))


class PixelUnshuffle(nn.Module):
    """(B, C, H, W) -> (B, 4C, H/2, W/2), as ``nn.PixelUnshuffle(2)``, but exported with static shapes."""

    def forward(self, x: Tensor) -> Tensor:
        cells = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H/2, 2, W/2, 2)
        return cells.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class Downsample(nn.Module):
    """3x3 convolution to half the channels, then pixel unshuffle: (B, C, H, W) -> (B, 2C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), PixelUnshuffle())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """3x3 convolution to twice the channels, then pixel shuffle: (B, C, H, W) -> (B, C/2, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class PatchEmbed(nn.Module):
    """Overlapping embedding by a 3x3 convolution: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FinalLayer(nn.Module):
    """Modulated norm and 3x3 convolution to the output channels."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = ChannelNorm(hidden_size)
        self.out_proj = nn.Conv2d(hidden_size, out_channels, 3, padding=1)
        self.adaLN_modulation = Modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation.pixels(c)
        return self.out_proj(modulate(self.norm_final(x), shift, scale))


class DiCo(nn.Module):
    """Diffusion ConvNet.

    ``depth`` counts the blocks of encoder 1, encoder 2, latent, decoder 2, decoder 1; their widths are h, 2h, 4h,
    2h, 2h (the last decoder stays at 2h and takes the second level's condition).

    Inputs: x (B, in_channels, H, W) float32 with H and W multiples of 4; t (B,) float32 in steps of the original
    schedule; y (B,) int64, ``num_classes`` being the null label. Output: (B, out_channels, H, W), where
    ``learn_sigma`` doubles the channels.
    """

    def __init__(
        self,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: Sequence[int] = (2, 5, 8, 5, 2),
        mlp_ratio: float = 4,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        if len(depth) != 5 or min(depth) < 0:
            raise ValueError(f"depth needs five block counts, got {list(depth)}")
        if hidden_size % 2:
            raise ValueError(f"hidden_size {hidden_size} must be even")
        h1, h2, h4 = hidden_size, hidden_size * 2, hidden_size * 4
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        def blocks(width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(DiCoBlock(width, mlp_ratio) for _ in range(count))

        self.x_embedder = PatchEmbed(in_channels, h1)
        self.t_embedder_1 = TimestepEmbedder(h1)
        self.t_embedder_2 = TimestepEmbedder(h2)
        self.t_embedder_3 = TimestepEmbedder(h4)
        self.y_embedder = LabelEmbedder3(num_classes, (h1, h2, h4), class_dropout_prob)

        self.encoder_level_1 = blocks(h1, depth[0])
        self.down1_2 = Downsample(h1)
        self.encoder_level_2 = blocks(h2, depth[1])
        self.down2_3 = Downsample(h2)
        self.latent = blocks(h4, depth[2])
        self.up3_2 = Upsample(h4)
        self.reduce_chan_level2 = nn.Conv2d(h4, h2, 1)
        self.decoder_level_2 = blocks(h2, depth[3])
        self.up2_1 = Upsample(h2)
        self.reduce_chan_level1 = nn.Conv2d(h2, h2, 1)
        self.decoder_level_1 = blocks(h2, depth[4])
        self.final_layer = FinalLayer(h2, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        y1, y2, y3 = self.y_embedder(y)
        c1 = self.t_embedder_1(t) + y1
        c2 = self.t_embedder_2(t) + y2
        c3 = self.t_embedder_3(t) + y3

        skip1 = run(self.encoder_level_1, self.x_embedder(x), c1)
        skip2 = run(self.encoder_level_2, self.down1_2(skip1), c2)
        h = run(self.latent, self.down2_3(skip2), c3)
        h = self.reduce_chan_level2(torch.cat([self.up3_2(h), skip2], dim=1))
        h = run(self.decoder_level_2, h, c2)
        h = self.reduce_chan_level1(torch.cat([self.up2_1(h), skip1], dim=1))
        h = run(self.decoder_level_1, h, c2)
        return self.final_layer(h, c2)


def run(blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
    """Apply the blocks of one level in order."""
    for block in blocks:
        x = block(x, c)
    return x
