"""The KL autoencoder of MAR (arXiv 2406.11838), 16 times smaller, in two halves: image -> posterior, latent -> image.

Source: LTH14/mar@fe470ac ``models/vae.py`` ``AutoencoderKL``, after CompVis/latent-diffusion. Parameter
names are theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dexport.graphs.compvis import LOGVAR_RANGE, Decoder, Encoder, Style

STYLE = Style()


class KlHalf(nn.Module):
    """What both halves share: all settings of the autoencoder, so that its one configuration builds either.

    Args:
        embed_dim: channels of the latent.
        ch, ch_mult: the width, and what it is multiplied with at each level, highest resolution first.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        use_variational: the posterior has a variance of its own; else its log variance is 1.
        attn_resolutions: sides at which a level has attention, where the image has the side ``resolution``; None for
            that of the half as released: 16 for the encoder, none for the decoder.
        resolution: side of the images of the training; an image of another size has its attention at the same levels.
        in_channels, out_ch: of the image that goes in, and that comes out.

    Raises:
        ValueError: a configuration that this network cannot have.
    """

    released: Sequence[int]

    def __init__(
        self,
        embed_dim: int = 16,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        use_variational: bool = True,
        attn_resolutions: Sequence[int] | None = None,
        resolution: int = 256,
        in_channels: int = 3,
        out_ch: int = 3,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim {embed_dim} must be at least 1")
        sides = self.released if attn_resolutions is None else attn_resolutions
        if not isinstance(sides, Sequence) or isinstance(sides, str):
            raise ValueError(f"attn_resolutions {sides!r} must be a list of sides, such as [16]")
        # What is no list is refused where the levels are made.
        levels = len(ch_mult) if isinstance(ch_mult, Sequence) else 0
        attention = [resolution // 2**level in sides for level in range(levels)]
        self.embed_dim = embed_dim
        self.in_channels = in_channels
        self.out_ch = out_ch
        self.use_variational = use_variational
        self.build(ch, ch_mult, num_res_blocks, attention)

    @abstractmethod
    def build(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: Sequence[bool]) -> None:
        """Create the layers of this half."""


class KlEncoder(KlHalf):
    """The posterior of an image.

    Input: image (B, in_channels, H, W) float32 in [-1, 1], H and W multiples of f = 2 ** (levels - 1). Outputs: mean
    and std, both (B, embed_dim, H/f, W/f) float32. A sample is mean + std * noise; MAR's tokens are 0.2325 times that.
    """

    released = (16,)

    def build(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: Sequence[bool]) -> None:
        moments = 2 * self.embed_dim
        self.encoder = Encoder(STYLE, self.in_channels, moments, ch, ch_mult, num_res_blocks, attention)
        self.quant_conv = nn.Conv2d(moments, moments if self.use_variational else self.embed_dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.quant_conv(self.encoder(image))
        if self.use_variational:
            mean, logvar = moments.chunk(2, dim=1)
        else:
            mean, logvar = moments, torch.ones_like(moments)
        return mean, torch.exp(0.5 * torch.clamp(logvar, *LOGVAR_RANGE))


class KlDecoder(KlHalf):
    """The image of a latent.

    Input: z (B, embed_dim, h, w) float32, divided by 0.2325 already. Output: image (B, out_ch, f*h, f*w) float32 in
    about [-1, 1], not clamped, f = 2 ** (levels - 1).
    """

    released = ()

    def build(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: Sequence[bool]) -> None:
        self.decoder = Decoder(STYLE, self.embed_dim, self.out_ch, ch, ch_mult, num_res_blocks, attention)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, self.embed_dim, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
