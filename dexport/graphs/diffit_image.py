"""DiffiT in image space: an OWN READING of the paper (arXiv 2312.02139), as no official code or weights exist.

Where the paper contradicts itself (blocks per level), appendix H is followed; every such choice is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.diffit import DiffiTBlock, index_table
from dexport.graphs.layers import TimestepEmbedder

GROUPS = 32
NOISE_SCALE = 1000.0
"""c_noise of EDM is ln(sigma)/4, in about [-2, 1.1]; the sinusoidal features expect steps of a schedule."""


class ResBlock(nn.Module):
    """x + DiffiTBlock(conv(swish(norm(x))), c), the block in windows: x (B, C, H, W), c (B, C) -> (B, C, H, W)."""

    def __init__(self, channels: int, condition: int, num_heads: int, mlp_ratio: float, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.GroupNorm(min(GROUPS, channels), channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Linear(condition, channels)
        self.block = DiffiTBlock(channels, num_heads, mlp_ratio, window, index_table(window))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x)))
        rows, columns = h.shape[2] // self.window, h.shape[3] // self.window
        # One condition per window: (B, C) -> (B * windows, C).
        c = self.condition(c).unsqueeze(1).expand(-1, rows * columns, -1).flatten(0, 1)
        tokens = self.block(self._to_windows(h, rows, columns), c)
        return x + self._from_windows(tokens, rows, columns)

    def _to_windows(self, h: Tensor, rows: int, columns: int) -> Tensor:
        cells = h.unflatten(3, (columns, self.window)).unflatten(2, (rows, self.window))
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

    def _from_windows(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        channels = tokens.shape[2]
        cells = tokens.reshape(-1, rows, columns, self.window, self.window, channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * self.window, columns * self.window)


class DiffiTUNet(nn.Module):
    """The raw network F of EDM: scaled image (B, C, H, W) and noise feature (B,) -> (B, C, H, W)."""

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_blocks: Sequence[int],
        num_heads: int,
        mlp_ratio: float,
        window: int,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        if len(num_blocks) != levels:
            raise ValueError(f"num_blocks {list(num_blocks)} needs one entry per level of {list(channel_mult)}")
        sides = [input_size >> level for level in range(levels)]
        windows = [min(window, side) for side in sides]
        if input_size % (1 << (levels - 1)) or any(s % w for s, w in zip(sides, windows, strict=True)):
            raise ValueError(f"input_size {input_size} does not divide into {levels} levels of windows {window}")
        widths = [channels * factor for factor in channel_mult]
        if any(width % num_heads or width % min(GROUPS, width) for width in widths):
            raise ValueError(f"widths {widths} must be multiples of num_heads {num_heads} and of {GROUPS}")

        def level(index: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResBlock(widths[index], channels, num_heads, mlp_ratio, windows[index])
                for _ in range(num_blocks[index])
            )

        self.t_embedder = TimestepEmbedder(channels)
        self.tokenizer = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.encoder = nn.ModuleList(level(index) for index in range(levels))
        self.down = nn.ModuleList(
            nn.Conv2d(widths[index], widths[index + 1], 3, stride=2, padding=1) for index in range(levels - 1)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(widths[index + 1], widths[index], 3, padding=1) for index in range(levels - 1)
        )
        self.merge = nn.ModuleList(nn.Conv2d(2 * widths[index], widths[index], 1) for index in range(levels - 1))
        self.decoder = nn.ModuleList(level(index) for index in range(levels - 1))
        self.head_norm = nn.GroupNorm(min(GROUPS, channels), channels)
        self.head = nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        c = F.silu(self.t_embedder(noise))
        h = self.tokenizer(x)
        skips = []
        for index, blocks in enumerate(self.encoder):
            if index:
                h = self.down[index - 1](h)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, c)
            skips.append(h)
        for index in reversed(range(len(self.decoder))):
            h = self.up[index](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = self.merge[index](torch.cat([h, skips[index]], dim=1))
            for block in self.decoder[index]:  # type: ignore[attr-defined]
                h = block(h, c)
        return self.head(F.silu(self.head_norm(h)))


class DiffiTImage(nn.Module):
    """U-shaped image-space denoiser with EDM preconditioning, which alone is the root module.

    Inputs: x (B, in_channels, input_size, input_size), a noisy image; sigma (B,), its noise level. Output: the denoised
    image, of the same shape. Defaults are FFHQ-64.

    Args:
        channels, channel_mult: width of each level, highest resolution first.
        num_blocks: residual blocks per level, in the encoder and again in the decoder.
        window: side of the attention windows; levels smaller than it use one window.
        sigma_data: standard deviation of the data, of EDM.
    """

    def __init__(
        self,
        input_size: int = 64,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: Sequence[int] = (4, 4, 4, 4),
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        window: int = 8,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.net = DiffiTUNet(input_size, in_channels, channels, channel_mult, num_blocks, num_heads, mlp_ratio, window)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1)
        variance = level**2 + self.sigma_data**2
        out = self.net(x / variance.sqrt(), sigma.log() * (NOISE_SCALE / 4))
        return x * (self.sigma_data**2 / variance) + out * (level * self.sigma_data / variance.sqrt())
