"""The KL autoencoder of latent diffusion (arXiv 2112.10752), in two halves: image -> posterior, latent -> image.

Source: huggingface/diffusers 0.42.1 ``AutoencoderKL``. Constructor arguments and parameter names are theirs; the
original is CompVis/latent-diffusion ``AutoencoderKL``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.compvis import LOGVAR_RANGE, NORM_EPS, Downsample, ResnetBlock, Upsample, attend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}
DOWN_BLOCK = "DownEncoderBlock2D"
UP_BLOCK = "UpDecoderBlock2D"


class Attention(nn.Module):
    """x plus one head of softmax attention over all positions of its norm: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h_BTC = self.group_norm(x).flatten(2).transpose(1, 2)
        out_BTC = self.to_out(attend(self.to_q(h_BTC), self.to_k(h_BTC), self.to_v(h_BTC)))
        return x + out_BTC.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, act_fn: str) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList(_resnets((channels, channels), 2, groups, act_fn))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """One level of the encoder: ``layers`` residual blocks, then a downsampler unless it is the last level."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, act_fn: str, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(widths, layers, groups, act_fn)
        self.downsamplers = nn.Sequential(*([] if last else [Downsample(widths[1])]))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsamplers(self.resnets(x))


class UpBlock(nn.Module):
    """One level of the decoder: ``layers`` residual blocks, then an upsampler unless it is the last level."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, act_fn: str, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(widths, layers, groups, act_fn)
        self.upsamplers = nn.Sequential(*([] if last else [Upsample(widths[1])]))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(self.resnets(x))


def _resnets(widths: tuple[int, int], layers: int, groups: int, act_fn: str) -> nn.Sequential:
    """``layers`` residual blocks, of which the first changes the width."""
    inputs = (widths[0], *[widths[1]] * (layers - 1))
    act = ACTIVATIONS[act_fn]
    return nn.Sequential(*(ResnetBlock(width, widths[1], groups, act, shortcut="conv_shortcut") for width in inputs))


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) -> moments before the last 1x1 convolution (B, out_channels, H/f, W/f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, act_fn: str
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(pair, layers, groups, act_fn, last) for pair, last in _levels(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, act_fn)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for block in self.down_blocks:
            h = block(h)
        # The last activation is SiLU whatever ``act_fn`` says.
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Latent after the first 1x1 convolution (B, in_channels, h, w) -> image (B, out_channels, f*h, f*w)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, act_fn: str
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1], groups, act_fn)
        # One residual block more per level than the encoder has.
        self.up_blocks = nn.ModuleList(
            UpBlock(pair, layers + 1, groups, act_fn, last) for pair, last in _levels(widths[::-1])
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _levels(widths: Sequence[int]) -> list[tuple[tuple[int, int], bool]]:
    """(width before, width) of each level in the order of computation, and whether it is the last."""
    before = (widths[0], *widths[:-1])
    pairs = list(zip(before, widths, strict=True))
    return [(pair, level == len(pairs)) for level, pair in enumerate(pairs, start=1)]


class AutoencoderHalf(nn.Module):
    """What both halves share: all settings of the autoencoder, so that its one configuration builds either.

    Args:
        in_channels, out_channels: channels of the image that goes in, and that comes out.
        down_block_types, up_block_types: one per level, all of the plain kind; None for just that.
        block_out_channels: width of each level, highest resolution first; each further level halves the resolution.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        act_fn: activation inside residual blocks.
        latent_channels: channels of the latent.
        norm_num_groups: groups of every group norm.
        sample_size, scaling_factor: image side of the training, and the factor from latents to what a denoiser sees.
            No part of the network depends on them.

    Raises:
        ValueError: a configuration that this network cannot have.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] | None = None,
        up_block_types: Sequence[str] | None = None,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        for kind, types in ((DOWN_BLOCK, down_block_types), (UP_BLOCK, up_block_types)):
            if types is not None and list(types) != [kind] * len(block_out_channels):
                raise ValueError(f"block types {list(types)} must be {kind}, one per level of block_out_channels")
        if not block_out_channels or any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"block_out_channels {list(block_out_channels)} must be multiples of norm_num_groups {norm_num_groups}"
            )
        if layers_per_block < 1:
            raise ValueError(f"layers_per_block {layers_per_block} must be at least 1")
        if act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn {act_fn!r} is none of {', '.join(ACTIVATIONS)}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.latent_channels = latent_channels
        self.sample_size = sample_size
        self.scaling_factor = scaling_factor
        self.build(block_out_channels, layers_per_block, norm_num_groups, act_fn)

    @abstractmethod
    def build(self, widths: Sequence[int], layers: int, groups: int, act_fn: str) -> None:
        """Create the layers of this half."""


class VaeEncoder(AutoencoderHalf):
    """The posterior of an image.

    Input: image (B, in_channels, H, W) float32 in [-1, 1], H and W multiples of f = 2 ** (levels - 1). Outputs: mean
    and logvar, both (B, latent_channels, H/f, W/f) float32, logvar clamped to [-30, 20]. A sample is
    mean + exp(logvar / 2) * noise, and scaling_factor times that is what a denoiser sees.
    """

    def build(self, widths: Sequence[int], layers: int, groups: int, act_fn: str) -> None:
        moments = 2 * self.latent_channels
        self.encoder = Encoder(self.in_channels, moments, widths, layers, groups, act_fn)
        self.quant_conv = nn.Conv2d(moments, moments, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, torch.clamp(logvar, *LOGVAR_RANGE)


class VaeDecoder(AutoencoderHalf):
    """The image of a latent.

    Input: z (B, latent_channels, h, w) float32, divided by scaling_factor already. Output: image (B, out_channels,
    f*h, f*w) float32 in about [-1, 1], not clamped, f = 2 ** (levels - 1).
    """

    def build(self, widths: Sequence[int], layers: int, groups: int, act_fn: str) -> None:
        self.decoder = Decoder(self.latent_channels, self.out_channels, widths, layers, groups, act_fn)
        self.post_quant_conv = nn.Conv2d(self.latent_channels, self.latent_channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
