"""Blocks and halves of the autoencoders that descend from latent diffusion: KL-VAEs and VQGANs.

Source: CompVis/latent-diffusion and CompVis/taming-transformers; what each system changed is a :class:`Style`, read in
its own repository. Numbers of channels are multiples of 32 (the groups of every norm), sizes (B, C, H, W).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dexport import limits

NORM_EPS = 1e-6
GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)
"""A posterior's log variance is clamped to it."""
Activation = Callable[[Tensor], Tensor]


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B, in, H, W) -> (B, out, H, W).

    Where the number of channels changes, a 1x1 convolution takes the place of x.

    Args:
        bias: of the convolutions.
        shortcut: the name of that 1x1 convolution.
        of_output: it is of the block's output instead, and x is dropped, as in MAGE's VQGAN.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = GROUPS,
        act: Activation = F.silu,
        *,
        bias: bool = True,
        shortcut: str = "nin_shortcut",
        of_output: bool = False,
    ) -> None:
        super().__init__()
        self.act = act
        self.norm1 = nn.GroupNorm(groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = nn.GroupNorm(groups, out_channels, NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.shortcut = shortcut if in_channels != out_channels else ""
        self.of_output = of_output
        if self.shortcut:
            width = out_channels if of_output else in_channels
            self.add_module(shortcut, nn.Conv2d(width, out_channels, 1, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        if not self.shortcut:
            return x + h
        return getattr(self, self.shortcut)(h if self.of_output else x) + h


def attend(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """Softmax attention of one head over all positions, (B, T, C) each."""
    return F.scaled_dot_product_attention(q_BTC.unsqueeze(1), k_BTC.unsqueeze(1), v_BTC.unsqueeze(1)).squeeze(1)


class AttnBlock(nn.Module):
    """x plus one head of attention over all positions of its norm: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q_BTC, k_BTC, v_BTC = (
            project(h).flatten(2).transpose(1, 2).contiguous() for project in (self.q, self.k, self.v)
        )
        out_BCT = attend(q_BTC, k_BTC, v_BTC).transpose(1, 2)
        return x + self.proj_out(out_BCT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the resolution by a convolution; the odd padding, right and bottom only, is the original's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution where there is one."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class Style:
    """What a system changed, and how it names the parts.

    Attributes:
        levels: the lists of levels in the encoder and in the decoder.
        blocks: the residual blocks of a level.
        middle: first block, attention and second block at the lowest resolution; no attention where its name is empty.
        ascending: the decoder counts its levels from the lowest resolution on, not from the highest.
        more_blocks: residual blocks that a level of the decoder has more than one of the encoder.
        bias: of the convolutions in residual blocks, and of the encoder's first one.
        of_output: of :class:`ResnetBlock`.
        kernel_out: side of the encoder's last convolution.
    """

    levels: tuple[str, str] = ("down", "up")
    blocks: str = "block"
    middle: tuple[str, str, str] = ("block_1", "attn_1", "block_2")
    ascending: bool = False
    more_blocks: int = 1
    bias: bool = True
    of_output: bool = False
    kernel_out: int = 3

    def block(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(in_channels, out_channels, bias=self.bias, of_output=self.of_output)

    def mid(self, channels: int) -> nn.Sequential:
        """The blocks at the lowest resolution."""
        first, attention, second = self.middle
        parts: list[tuple[str, nn.Module]] = [(first, self.block(channels, channels))]
        if attention:
            parts.append((attention, AttnBlock(channels)))
        parts.append((second, self.block(channels, channels)))
        return nn.Sequential(OrderedDict(parts))


class Level(nn.Module):
    """Residual blocks at one resolution, attention behind each where there is some, then another resolution."""

    def __init__(
        self,
        style: Style,
        widths: tuple[int, int],
        blocks: int,
        attention: bool,
        resample: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        inputs = (widths[0], *[widths[1]] * (blocks - 1))
        self.blocks = style.blocks
        self.add_module(style.blocks, nn.ModuleList(style.block(width, widths[1]) for width in inputs))
        self.attn = nn.ModuleList(AttnBlock(widths[1]) for _ in inputs if attention)
        self.resample = resample[0] if resample else ""
        if resample:
            self.add_module(*resample)

    def forward(self, h: Tensor) -> Tensor:
        for index, block in enumerate(getattr(self, self.blocks)):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        return getattr(self, self.resample)(h) if self.resample else h


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) -> (B, out_channels, H/f, W/f), f = 2 ** (levels - 1).

    Args:
        ch, ch_mult: the width, and what it is multiplied with at each level, highest resolution first.
        num_res_blocks: residual blocks of a level.
        attention: whether each level has some; none has where it is empty.
        pooled: resolutions are halved by an average instead of a convolution.
    """

    def __init__(
        self,
        style: Style,
        in_channels: int,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool] = (),
        *,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(ch, ch_mult, num_res_blocks)
        attention = attention or [False] * len(widths)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1, bias=style.bias)
        self.levels = style.levels[0]
        levels = nn.ModuleList()
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            down = None if last else ("downsample", nn.AvgPool2d(2) if pooled else Downsample(width))
            pair = (ch if index == 0 else widths[index - 1], width)
            levels.append(Level(style, pair, num_res_blocks, attention[index], down))
        self.add_module(self.levels, levels)
        self.mid = style.mid(widths[-1])
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, style.kernel_out, padding=style.kernel_out // 2)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in getattr(self, self.levels):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent (B, in_channels, h, w) -> image (B, out_channels, f*h, f*w); arguments as in :class:`Encoder`.

    Args:
        with_conv: a convolution follows each doubling of the resolution.
    """

    def __init__(
        self,
        style: Style,
        in_channels: int,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool] = (),
        *,
        with_conv: bool = True,
    ) -> None:
        super().__init__()
        widths = _widths(ch, ch_mult, num_res_blocks)
        attention = attention or [False] * len(widths)
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = style.mid(widths[-1])
        self.levels, self.ascending = style.levels[1], style.ascending
        levels = []
        for index in reversed(range(len(widths))):
            up = ("upsample", Upsample(widths[index], with_conv)) if index else None
            pair = (widths[min(index + 1, len(widths) - 1)], widths[index])
            levels.append(Level(style, pair, num_res_blocks + style.more_blocks, attention[index], up))
        self.add_module(self.levels, nn.ModuleList(levels if style.ascending else levels[::-1]))
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        levels = list(getattr(self, self.levels))
        for level in levels if self.ascending else levels[::-1]:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _widths(ch: int, ch_mult: Sequence[int], num_res_blocks: int) -> list[int]:
    """The width of every level.

    Raises:
        ValueError: levels that the network cannot have.
    """
    if isinstance(ch_mult, str) or not isinstance(ch_mult, Sequence) or not ch_mult:
        raise ValueError(f"ch_mult {ch_mult!r} must be a list with a factor for each level, such as [1, 1, 2, 2, 4]")
    if any(isinstance(factor, bool) or not isinstance(factor, int) or factor < 1 for factor in ch_mult):
        raise ValueError(f"ch_mult {list(ch_mult)} must be whole numbers from 1")
    if ch < 1 or ch % GROUPS:
        raise ValueError(f"ch {ch} must be a multiple of {GROUPS}, the groups of every norm")
    if num_res_blocks < 1:
        raise ValueError(f"num_res_blocks {num_res_blocks} must be at least 1")
    return [ch * factor for factor in ch_mult]


class Codebook(nn.Module):
    """The vectors that codes stand for, ``embedding`` (codebook_size, width).

    Args:
        l2_norm: they are divided by their lengths.
    """

    def __init__(self, codebook_size: int, width: int, l2_norm: bool = False) -> None:
        super().__init__()
        if codebook_size < 1 or width < 1:
            raise ValueError(f"a codebook of {codebook_size} vectors of {width} numbers must have one or more of both")
        limits.check_table(codebook_size, width)
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(codebook_size, width)

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors as they are compared and looked up."""
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors

    def distances(self, z_BTC: Tensor) -> Tensor:
        """Squared distances of vectors to every code: (B, T, codebook_size)."""
        z_BTC, codes_KC = self.scaled(z_BTC), self.scaled(self.embedding.weight)
        products = z_BTC @ codes_KC.transpose(0, 1)
        return (z_BTC**2).sum(2, keepdim=True) + (codes_KC**2).sum(1) - 2 * products


class Lookup(Codebook):
    """Codes (B, T) int64 -> their vectors (B, T, width)."""

    def forward(self, codes: Tensor) -> Tensor:
        return self.scaled(self.embedding(codes))


class Nearest(Codebook):
    """Vectors (B, T, width) -> the nearest codes (B, T) int64, the first of several that are equally near."""

    def forward(self, z_BTC: Tensor) -> Tensor:
        return self.distances(z_BTC).argmin(2)
