"""DiffiT: latent at 256 and 512 px as released, and image space as an own reading of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dexport.contract import GuidanceRule
from dexport.exporter.recipes.denoiser import LINEAR_DDPM, class_conditional, require_null_label
from dexport.exporter.recipes.recipe import BATCH, Guidance, Islands, Recipe, Sampling, Signature, TensorSpec
from dexport.graphs.diffit import DiffiT
from dexport.graphs.diffit_image import DiffiTImage

LARGEST_POWER_COSINE = 32
"""Up to this ``input_size`` the official code ramps the guidance, above it is constant."""
POWER = 4.0
RELEASED_DEPTH = 28
EDM_SIGMAS = (0.002, 80.0)


def guidance_rule(config: Mapping[str, Any]) -> GuidanceRule:
    """Guidance on the first three channels: power-cosine up to an input size of 32, constant above."""
    ramped = config.get("input_size", LARGEST_POWER_COSINE) <= LARGEST_POWER_COSINE
    return GuidanceRule(channels=3, power=POWER if ramped else None)


def latent(image_size: int, default_scale: float) -> Recipe:
    side = image_size // 8
    return Recipe(
        name=f"diffit-{image_size}",
        family="DiffiT",
        summary=f"DiffiT in latent space, {image_size} px (depth {RELEASED_DEPTH} as released; the paper says 30)",
        source="NVlabs/DiffiT@9f6f0a5",
        constructor=DiffiT,
        config={"input_size": side, "depth": RELEASED_DEPTH, "hidden_size": 1152, "patch_size": 2, "num_heads": 16},
        signature=class_conditional,
        latent=(side, side),
        latent_multiple="patch_size",
        size_argument="input_size",
        sampling=LINEAR_DDPM,
        guidance=Guidance(guidance_rule, default_scale, require_null_label),
        checkpoints=(f"diffit_{image_size}.safetensors",),
        hub="see NVlabs/DiffiT (non-commercial licence)",
        ops=("DexTMSA",),
        islands=Islands(modules=("t_embedder",)),
        quantize_exclude=("x_embedder", "t_embedder", "*.qkv_temb", "final_layer"),
    )


def image_signature(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
    """x, sigma -> out: the denoised image of EDM."""
    image = (BATCH, config.get("in_channels", 3), *size)
    return Signature(
        inputs=(
            TensorSpec("x", "float32", image),
            TensorSpec("sigma", "float32", (BATCH,), "stratified", *EDM_SIGMAS),
        ),
        outputs=(TensorSpec("out", "float32", image),),
    )


def image(name: str, size: int, **config: Any) -> Recipe:
    return Recipe(
        name=name,
        family="DiffiT",
        summary=f"DiffiT in image space, {size} px: OWN READING of the paper, no reference exists",
        source="arXiv 2312.02139 (no official code)",
        constructor=DiffiTImage,
        config={"input_size": size, **config},
        signature=image_signature,
        latent=(size, size),
        size_argument="input_size",
        pixels_per_latent=1,
        sampling=Sampling("EDM, sigma 0.002..80", "denoised image", "edm", 40 if size > 32 else 18, 1.0, "none"),
        ops=("DexTMSA",),
        # The preconditioning multiplies by sigma up to 80 and divides by it: root module, kept in float32.
        islands=Islands(modules=("net.t_embedder", ""), ops=(*Islands().ops, "GroupNormalization")),
        quantize_exclude=("net.tokenizer", "net.t_embedder", "*.qkv_temb", "*.condition", "net.head"),
    )


RECIPES = (
    latent(256, default_scale=4.4),
    latent(512, default_scale=1.49),
    image("diffit-image-64", 64),
    image("diffit-image-32", 32, channel_mult=[1, 2, 2], num_blocks=[4, 4, 4], window=4),
)
