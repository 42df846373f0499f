"""What the network is, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dexport.cli.headings import option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import PIXELS
from dexport.errors import UsageError
from dexport.limits import shown

LONGEST_NUMBER = 9
"""Digits of a side, which keeps the product of two in bounds as well."""


@dataclass(frozen=True)
class Network:
    """What the network is.

    Attributes:
        settings: ``NAME=VALUE`` of constructor arguments.
        latent: (height, width) of the spatial input.
        image_size: in pixels.
        stitch: several denoisers, in place of a recipe.
    """

    settings: tuple[str, ...]
    image_size: int | None
    latent: tuple[int, int] | None
    stitch: str | None
    with_decoder: bool


def _network(latent: str | None, **values: Any) -> Network:
    return Network(latent=_parse_latent(latent), **values)


def _parse_latent(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()) or max(len(height), len(width)) > LONGEST_NUMBER:
        raise UsageError(f"--latent {shown(text)} is not HEIGHTxWIDTH", hint="for example --latent 8x20")
    return int(height), int(width)


NETWORK = OptionGroup(
    "network",
    "Network",
    _network,
    (
        option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="A constructor argument, such as hidden_size=384. Repeatable.",
        ),
        option("--image-size", type=PIXELS, metavar="PIXELS", help="Side of the square image."),
        option("--latent", metavar="HxW", help="Spatial size of the network's input, such as 8x20."),
        option(
            "--stitch",
            metavar="NAME[=CHECKPOINT]:SHARE,...",
            help="Instead of RECIPE: several denoisers, noisiest first, with their shares of the trajectory. "
            "NAME is a recipe, or the folder of a bundle.",
        ),
        option(
            "--with-decoder/--without-decoder", default=False, help="Put the decoder of the latents into the bundle."
        ),
    ),
)
