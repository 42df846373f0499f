"""LiT S/B/L/XL with patch 2, at 256 and 512 px. An own reading: no official code, weights or outputs could be had."""

from __future__ import annotations

from dexport.exporter.recipes import dit
from dexport.exporter.recipes.denoiser import ENDS_AND_MODULATION, LINEAR_DDPM, class_conditional, first_channels
from dexport.exporter.recipes.recipe import Islands, Recipe
from dexport.graphs.lit import LiT

HEADS = {"s": 2, "b": 3, "l": 4, "xl": 4}
"""S and XL from secondary sources, B and L plausible: fewer heads than DiT."""
PATCH = 2


def variant(size: str, image_size: int) -> Recipe:
    side = image_size // 8
    return Recipe(
        name=f"lit-{size}-{PATCH}" + ("" if image_size == 256 else f"-{image_size}"),
        family="LiT",
        summary=f"LiT-{size.upper()}/{PATCH}, {image_size} px: OWN READING of the paper, no reference exists",
        source="arXiv 2501.12976 (official code not available)",
        constructor=LiT,
        config={"input_size": side, "patch_size": PATCH, **dit.SIZES[size], "num_heads": HEADS[size]},
        signature=class_conditional,
        latent=(side, side),
        latent_multiple="patch_size",
        size_argument="input_size",
        sampling=LINEAR_DDPM,
        guidance=first_channels(default_scale=1.5),
        ops=("DexLinearAttention",),
        islands=Islands(modules=("t_embedder",)),
        quantize_exclude=ENDS_AND_MODULATION,
        not_inherited=("blocks.*.attn",),
    )


RECIPES = tuple(variant(size, image_size) for image_size in (256, 512) for size in HEADS)
