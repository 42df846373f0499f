"""The KL autoencoder whose latents MAR draws: a decoder and an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dexport.exporter.recipes.autoencoder import FIRST, GATES, factor_of, half, islands, picture
from dexport.exporter.recipes.recipe import BATCH, Islands, Recipe, Signature, TensorSpec, settings_of
from dexport.graphs.mar_vae import KlDecoder, KlEncoder

IMAGE_SIZE = 256


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    return factor_of(settings_of(KlEncoder, config)["ch_mult"])


def encoder_signature(config: Mapping[str, Any], image: tuple[int, int]) -> Signature:
    """image -> mean, std."""
    s, factor = settings_of(KlEncoder, config), pixels_per_latent(config)
    shape = (BATCH, s["embed_dim"], *(side // factor for side in image))
    return Signature(
        inputs=(picture("image", s["in_channels"], image),),
        outputs=(TensorSpec("mean", "float32", shape), TensorSpec("std", "float32", shape)),
    )


def decoder_signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """z -> image."""
    s = settings_of(KlDecoder, config)
    return Signature(
        inputs=(TensorSpec("z", "float32", (BATCH, s["embed_dim"], *latent)),),
        outputs=(picture("image", s["out_ch"], latent, pixels_per_latent(config)),),
    )


def one(name: str, levels: str, inner: Islands, **fields: Any) -> Recipe:
    return Recipe(
        name=f"mar-vae-{name}",
        family="MAR VAE",
        source="LTH14/mar@fe470ac, models/vae.py",
        config={"ch_mult": [1, 1, 2, 2, 4]},
        checkpoints=("kl16.ckpt",),
        hub="kl16.ckpt, linked at https://github.com/LTH14/mar",
        adapt=half("MAR"),
        islands=replace(inner, optional=(f"{name}.{levels}.*.attn",)),
        gates=GATES,
        quantize_exclude=(f"{name}.conv_in", f"{name}.conv_out"),
        **fields,
    )


RECIPES = (
    one(
        "encoder",
        "down",
        islands("encoder.mid.attn_1"),
        summary="Encoder of MAR's KL-16: image to mean and standard deviation",
        constructor=KlEncoder,
        signature=encoder_signature,
        latent=(IMAGE_SIZE, IMAGE_SIZE),
        latent_multiple=pixels_per_latent,
        pixels_per_latent=1,
    ),
    one(
        "decoder",
        "up",
        islands(*FIRST),
        summary="Decoder of MAR's KL-16: latent of 16 channels to image",
        constructor=KlDecoder,
        signature=decoder_signature,
        latent=(IMAGE_SIZE // 16, IMAGE_SIZE // 16),
        pixels_per_latent=pixels_per_latent,
    ),
)
