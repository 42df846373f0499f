"""The VQGAN of MAGE (arXiv 2211.09117) and of MaskGIT before it, in two halves: image -> ids, ids -> image.

Source: LTH14/mage@1becb14 ``taming/models/vqgan.py`` ``VQModel``, which follows google-research/maskgit (JAX) and is no
CompVis VQGAN: there is neither attention nor a convolution around the codebook. Parameter names are theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dexport.graphs.compvis import Decoder, Encoder, Lookup, Nearest, Style

STYLE = Style(middle=("block_1", "", "block_2"), more_blocks=0, bias=False, of_output=True, kernel_out=1)


class VqganHalf(nn.Module):
    """What both halves share: all settings of the tokenizer, so that its one configuration builds either.

    Args:
        n_embed, embed_dim: codes, and the numbers that each stands for.
        ddconfig: the arguments that follow, as official files group them; its values go before theirs.
        ch, ch_mult: the width, and what it is multiplied with at each level, highest resolution first.
        num_res_blocks: residual blocks of a level, in both halves.
        z_channels: of the latent: ``embed_dim``, as nothing lies between it and the codebook.
        in_channels, out_ch: of the image that goes in, and that comes out.
        resamp_with_conv: resolutions change by a convolution; None for those of the decoder only, as released.
        double_z: false: no tokenizer has two outputs.
        attn_resolutions, resolution, dropout: accepted, as official files have them; there is no attention.
        grid: height and width of the ids, of which the decoder takes a flat list.

    Raises:
        ValueError: a configuration that this network cannot have.
    """

    def __init__(
        self,
        n_embed: int = 1024,
        embed_dim: int = 256,
        ddconfig: Mapping[str, Any] | None = None,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        in_channels: int = 3,
        out_ch: int = 3,
        resamp_with_conv: bool | None = None,
        double_z: bool = False,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        dropout: float = 0.0,
        grid: Sequence[int] = (16, 16),
    ) -> None:
        super().__init__()
        settings = {
            "ch": ch,
            "ch_mult": ch_mult,
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "in_channels": in_channels,
            "out_ch": out_ch,
            "resamp_with_conv": resamp_with_conv,
            "double_z": double_z,
            "attn_resolutions": attn_resolutions,
            "resolution": resolution,
            "dropout": dropout,
        }
        if not isinstance(ddconfig, Mapping | None):
            raise ValueError(f"ddconfig {ddconfig!r} must be a group of settings, such as {{'ch': 128}}")
        unknown = [name for name in ddconfig or () if name not in settings]
        if unknown:
            raise ValueError(f"ddconfig has no {', '.join(unknown)}: it has {', '.join(settings)}")
        settings |= ddconfig or {}
        if settings["double_z"]:
            raise ValueError("double_z is of autoencoders with a posterior, and this one has codes")
        if settings["z_channels"] != embed_dim:
            raise ValueError(f"z_channels {settings['z_channels']} must be embed_dim {embed_dim}")
        sides = tuple(grid) if isinstance(grid, Sequence) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"grid {grid!r} must be the height and the width of the ids, such as [16, 16]")
        self.grid = sides
        self.build(n_embed, settings)

    @abstractmethod
    def build(self, n_embed: int, settings: Mapping[str, Any]) -> None:
        """Create the layers of this half."""


class VqganEncoder(VqganHalf):
    """The ids of an image.

    Input: image (B, in_channels, H, W) float32 in [0, 1], H and W multiples of f = 2 ** (levels - 1). Output: ids
    (B, H/f * W/f) int64, row by row.
    """

    def build(self, n_embed: int, settings: Mapping[str, Any]) -> None:
        s = settings
        self.encoder = Encoder(
            STYLE,
            s["in_channels"],
            s["z_channels"],
            s["ch"],
            s["ch_mult"],
            s["num_res_blocks"],
            pooled=not s["resamp_with_conv"],
        )
        self.quantize = Nearest(n_embed, s["z_channels"])

    def forward(self, image: Tensor) -> Tensor:
        return self.quantize(self.encoder(image).flatten(2).transpose(1, 2))

    def distances(self, image: Tensor) -> Tensor:
        """From each place to each code, (B, H/f * W/f, n_embed)."""
        return self.quantize.distances(self.encoder(image).flatten(2).transpose(1, 2))


class VqganDecoder(VqganHalf):
    """The image of ids.

    Input: ids (B, h * w) int64, (h, w) = ``grid``, row by row. Output: image (B, out_ch, f*h, f*w) float32 in about
    [0, 1], not clamped, f = 2 ** (levels - 1).
    """

    def build(self, n_embed: int, settings: Mapping[str, Any]) -> None:
        s = settings
        self.decoder = Decoder(
            STYLE,
            s["z_channels"],
            s["out_ch"],
            s["ch"],
            s["ch_mult"],
            s["num_res_blocks"],
            with_conv=s["resamp_with_conv"] is not False,
        )
        self.quantize = Lookup(n_embed, s["z_channels"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.quantize(ids).transpose(1, 2).unflatten(2, self.grid))
