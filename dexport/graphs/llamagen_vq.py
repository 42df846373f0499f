"""The VQ tokenizer of LlamaGen (arXiv 2406.06525), in two halves: image -> codes, codes -> image.

Source: valeoai/Halton-MaskGIT@f61b0a1 ``Network/vq_model.py`` ``VQModel``, after FoundationVision/LlamaGen. Parameter
names are theirs; ``quantize.codebook_used``, a record of the training, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dexport.graphs.compvis import Decoder, Encoder, Lookup, Nearest, Style

STYLE = Style(levels=("conv_blocks", "conv_blocks"), blocks="res", middle=("0", "1", "2"), ascending=True)


class VqEncoder(nn.Module):
    """The codes of an image.

    Input: image (B, in_channels, H, W) float32 in [-1, 1], H and W multiples of f = 2 ** (levels - 1). Output: codes
    (B, H/f, W/f) int64.

    Args:
        codebook_size, codebook_embed_dim: codes, and the numbers that each stands for.
        codebook_l2_norm: vectors and codes are compared by their directions.
        z_channels: of the layers beside the codebook's.
        ch, ch_mult: the width, and what it is multiplied with at each level, highest resolution first.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        in_channels, out_channels: of the image that goes in, and that comes out.

    Raises:
        ValueError: a configuration that this network cannot have.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        del out_channels  # the decoder's
        attention = lowest(ch_mult)
        self.encoder = Encoder(STYLE, in_channels, z_channels, ch, ch_mult, num_res_blocks, attention)
        self.quantize = Nearest(codebook_size, codebook_embed_dim, codebook_l2_norm)
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        z = self.pre_quant(image)
        return self.quantize(z.flatten(2).transpose(1, 2)).unflatten(1, z.shape[2:])

    def pre_quant(self, image: Tensor) -> Tensor:
        """What is compared with the codebook, (B, codebook_embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(image))

    def distances(self, image: Tensor) -> Tensor:
        """From each place to each code, (B, H/f, W/f, codebook_size)."""
        z = self.pre_quant(image)
        return self.quantize.distances(z.flatten(2).transpose(1, 2)).unflatten(1, z.shape[2:])


class VqDecoder(nn.Module):
    """The image of codes.

    Input: codes (B, h, w) int64. Output: image (B, out_channels, f*h, f*w) float32 in about [-1, 1], not clamped,
    f = 2 ** (levels - 1). Arguments are those of :class:`VqEncoder`.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        del in_channels  # the encoder's
        attention = lowest(ch_mult)
        self.decoder = Decoder(STYLE, z_channels, out_channels, ch, ch_mult, num_res_blocks, attention)
        self.quantize = Lookup(codebook_size, codebook_embed_dim, codebook_l2_norm)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, 1)

    def forward(self, codes: Tensor) -> Tensor:
        vectors_BCT = self.quantize(codes.flatten(1)).transpose(1, 2)
        return self.decoder(self.post_quant_conv(vectors_BCT.unflatten(2, codes.shape[1:])))


def lowest(ch_mult: Sequence[int]) -> list[bool]:
    """Attention at the lowest resolution only."""
    levels = len(ch_mult) if isinstance(ch_mult, Sequence) else 0  # what is no list is refused where levels are made
    return [level == levels - 1 for level in range(levels)]
