"""The VQGAN whose ids MAGE and MaskGIT draw: an encoder and a decoder. MAGE's own checkpoints hold it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dexport.contract import LATENT
from dexport.exporter.recipes.autoencoder import (
    DISTANCES,
    FIRST,
    GATES,
    distances,
    factor_of,
    half,
    islands,
    picture,
)
from dexport.exporter.recipes.recipe import BATCH, Recipe, Signature, TensorSpec, settings_of
from dexport.graphs.mage_vqgan import VqganDecoder, VqganEncoder

IMAGE_SIZE = 256


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, those of ``ddconfig`` among them."""
    settings = settings_of(VqganEncoder, config)
    inner = settings["ddconfig"]
    return {**settings, **(inner if isinstance(inner, Mapping) else {})}


def pixels_per_id(config: Mapping[str, Any]) -> int:
    return factor_of(flat(config)["ch_mult"])


def encoder_signature(config: Mapping[str, Any], image: tuple[int, int]) -> Signature:
    """image -> encoded_ids."""
    factor = pixels_per_id(config)
    count = (image[0] // factor) * (image[1] // factor)
    return Signature(
        inputs=(picture("image", flat(config)["in_channels"], image),),
        outputs=(TensorSpec("encoded_ids", "int64", (BATCH, count), role=LATENT, scores=DISTANCES),),
    )


def decoder_signature(config: Mapping[str, Any], grid: tuple[int, int]) -> Signature:
    """ids -> decoded_image."""
    s = flat(config)
    ids = TensorSpec("ids", "int64", (BATCH, grid[0] * grid[1]), "integers", 0, s["n_embed"] - 1, role=LATENT)
    return Signature(inputs=(ids,), outputs=(picture("decoded_image", s["out_ch"], grid, pixels_per_id(config)),))


def one(name: str, **fields: Any) -> Recipe:
    return Recipe(
        name=f"mage-vqgan-{name}",
        family="MAGE VQGAN",
        source="LTH14/mage@1becb14, taming/models/vqgan.py",
        checkpoints=("vqgan_jax_strongaug.ckpt", "mage-vitb-1600.pth"),
        hub="vqgan_jax_strongaug.ckpt, linked at https://github.com/LTH14/mage",
        adapt=half("MAGE", prefix="vqgan."),
        gates=GATES,
        quantize_exclude=(f"{name}.conv_in", f"{name}.conv_out", "quantize"),
        **fields,
    )


RECIPES = (
    one(
        "encoder",
        summary="Encoder of MAGE's and MaskGIT's VQGAN: image in [0, 1] to 256 ids of 1024",
        constructor=VqganEncoder,
        config={"ch_mult": [1, 1, 2, 2, 4]},
        signature=encoder_signature,
        graphs={DISTANCES: distances(encoder_signature, lambda c: flat(c)["n_embed"])},
        latent=(IMAGE_SIZE, IMAGE_SIZE),
        latent_multiple=pixels_per_id,
        islands=islands("quantize"),
        pixels_per_latent=1,
    ),
    one(
        "decoder",
        summary="Decoder of MAGE's and MaskGIT's VQGAN: 256 ids of 1024 to image in [0, 1]",
        constructor=VqganDecoder,
        config={"ch_mult": [1, 1, 2, 2, 4], "grid": [IMAGE_SIZE // 16, IMAGE_SIZE // 16]},
        signature=decoder_signature,
        latent=(IMAGE_SIZE // 16, IMAGE_SIZE // 16),
        size_argument="grid",
        islands=islands(*FIRST, "quantize"),
        pixels_per_latent=pixels_per_id,
    ),
)
