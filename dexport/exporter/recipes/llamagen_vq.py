"""The VQ tokenizer of LlamaGen, whose codes Halton-MaskGIT draws: an encoder and a decoder."""

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
from dexport.graphs.llamagen_vq import VqDecoder, VqEncoder

IMAGE_SIZE = 256
USAGE = "quantize.codebook_used"


def pixels_per_code(config: Mapping[str, Any]) -> int:
    return factor_of(settings_of(VqEncoder, config)["ch_mult"])


def encoder_signature(config: Mapping[str, Any], image: tuple[int, int]) -> Signature:
    """image -> codes."""
    s, factor = settings_of(VqEncoder, config), pixels_per_code(config)
    grid = (side // factor for side in image)
    return Signature(
        inputs=(picture("image", s["in_channels"], image),),
        outputs=(TensorSpec("codes", "int64", (BATCH, *grid), role=LATENT, scores=DISTANCES),),
    )


def decoder_signature(config: Mapping[str, Any], grid: tuple[int, int]) -> Signature:
    """codes -> image."""
    s = settings_of(VqDecoder, config)
    largest = s["codebook_size"] - 1
    return Signature(
        inputs=(TensorSpec("codes", "int64", (BATCH, *grid), "integers", 0, largest, role=LATENT),),
        outputs=(picture("image", s["out_channels"], grid, pixels_per_code(config)),),
    )


def one(name: str, **fields: Any) -> Recipe:
    return Recipe(
        name=f"llamagen-vq16-{name}",
        family="LlamaGen VQ",
        source="valeoai/Halton-MaskGIT@f61b0a1, Network/vq_model.py",
        config={"ch_mult": [1, 1, 2, 2, 4]},
        checkpoints=("vq_ds16_c2i.pt",),
        hub="hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt",
        adapt=half("LlamaGen", training=(USAGE,)),
        gates=GATES,
        quantize_exclude=(f"{name}.conv_in", f"{name}.conv_out", "quantize"),
        **fields,
    )


RECIPES = (
    one(
        "encoder",
        summary="Encoder of LlamaGen's VQ-16: image to 16 x 16 codes of 16384",
        constructor=VqEncoder,
        signature=encoder_signature,
        graphs={DISTANCES: distances(encoder_signature, lambda c: settings_of(VqEncoder, c)["codebook_size"])},
        latent=(IMAGE_SIZE, IMAGE_SIZE),
        latent_multiple=pixels_per_code,
        pixels_per_latent=1,
        islands=islands("encoder.mid.1", "encoder.conv_blocks.*.attn", "quantize"),
    ),
    one(
        "decoder",
        summary="Decoder of LlamaGen's VQ-16: 16 x 16 codes of 16384 to image",
        constructor=VqDecoder,
        signature=decoder_signature,
        latent=(IMAGE_SIZE // 16, IMAGE_SIZE // 16),
        pixels_per_latent=pixels_per_code,
        islands=islands(*FIRST, "decoder.conv_blocks.*.attn", "quantize"),
    ),
)
