"""The VAE of Stable Diffusion, whose latents DiT and its relatives denoise: a decoder and an encoder.

Official files hold both halves; each recipe takes its own. They come in the layouts of diffusers (attention named as
today, or as before) and of CompVis, also inside a whole Stable Diffusion checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from dexport.exporter.recipes.autoencoder import factor_of, islands
from dexport.exporter.recipes.recipe import BATCH, Recipe, Signature, TensorSpec
from dexport.exporter.weights.checkpoint_view import View, renamed, stored
from dexport.exporter.weights.source import WeightSource
from dexport.graphs.sd_vae import VaeDecoder, VaeEncoder

IMAGE_SIZE = 256
WHOLE_VAE = {"encoder", "decoder", "quant_conv", "post_quant_conv", "loss"}
"""First parts of the names in a whole file; ``loss`` is the discriminator and other parts of the training."""
FIRST_STAGE = "first_stage_model."
"""Prefix of the VAE in a Stable Diffusion checkpoint, whose other names are other networks'."""

COMPVIS = re.compile(r"(encoder|decoder)\.(down\.|up\.|mid\.|norm_out\.)")
COMPVIS_NAMES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)
ATTENTION = re.compile(r"(.*\.mid_block\.attentions\.0\.)(\w+)(\.\w+)")
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
COMPVIS_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def adapt(source: WeightSource, module: nn.Module) -> WeightSource:
    """One half of a VAE in any of the layouts, as diffusers names it; the view drops what belongs to other networks."""
    prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in source.shapes) else ""
    others = WHOLE_VAE - {name for name, _ in module.named_children()}
    own = [
        name
        for name in source.shapes
        if name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] not in others
    ]
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    compvis = any(COMPVIS.match(name.removeprefix(prefix)) for name in own)
    levels = len(module.decoder.up_blocks) if isinstance(module, VaeDecoder) else 0

    def to_diffusers(name: str) -> str:
        name = name.removeprefix(prefix)
        return _from_compvis(name, levels) if compvis else _rename_attention(name, OLD_ATTENTION_NAMES)

    names = renamed(own, to_diffusers, expected)
    entries = {}
    for name, old in names.items():
        shape = source.shapes[old]
        # CompVis and some conversions of it have 1x1 convolutions where diffusers has linear layers.
        is_linear = name in expected and shape == (*expected[name], 1, 1)
        entries[name] = stored(source, old, expected[name] if is_linear else shape)
    return View(source, entries, "CompVis" if compvis else "diffusers")


def _from_compvis(name: str, levels: int) -> str:
    for pattern, replacement in COMPVIS_NAMES:
        name = re.sub(pattern, replacement, name)
    # CompVis counts the decoder's levels from the highest resolution, diffusers in the order of computation.
    name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
    return _rename_attention(name, COMPVIS_ATTENTION_NAMES)


def _rename_attention(name: str, names: Mapping[str, str]) -> str:
    match = ATTENTION.fullmatch(name)
    return match[1] + names.get(match[2], match[2]) + match[3] if match else name


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Each level after the first halves the resolution; what is no list of levels the constructor refuses."""
    return factor_of(config.get("block_out_channels"))


def decoder_signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """z -> image."""
    height, width = (side * pixels_per_latent(config) for side in latent)
    return Signature(
        inputs=(TensorSpec("z", "float32", (BATCH, config.get("latent_channels", 4), *latent)),),
        outputs=(TensorSpec("image", "float32", (BATCH, config.get("out_channels", 3), height, width)),),
    )


def encoder_signature(config: Mapping[str, Any], image: tuple[int, int]) -> Signature:
    """image -> mean, logvar."""
    latent = (side // pixels_per_latent(config) for side in image)
    shape = (BATCH, config.get("latent_channels", 4), *latent)
    return Signature(
        inputs=(TensorSpec("image", "float32", (BATCH, config.get("in_channels", 3), *image)),),
        outputs=(TensorSpec("mean", "float32", shape), TensorSpec("logvar", "float32", shape)),
    )


def half(name: str, **fields: Any) -> Recipe:
    return Recipe(
        name=f"sd-vae-{name}",
        family="SD VAE",
        source="huggingface/diffusers 0.42.1, AutoencoderKL",
        config={"block_out_channels": [128, 256, 512, 512]},
        checkpoints=("diffusion_pytorch_model.safetensors",),
        hub="hf://stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",
        adapt=adapt,
        islands=islands(f"{name}.mid_block.attentions"),
        quantize_exclude=(f"{name}.conv_in", f"{name}.conv_out"),
        **fields,
    )


RECIPES = (
    half(
        "decoder",
        summary="Decoder of the Stable Diffusion VAE (-ft-ema, -ft-mse): latent to image",
        constructor=VaeDecoder,
        signature=decoder_signature,
        latent=(IMAGE_SIZE // 8, IMAGE_SIZE // 8),
        pixels_per_latent=pixels_per_latent,
    ),
    half(
        "encoder",
        summary="Encoder of the Stable Diffusion VAE (-ft-ema, -ft-mse): image to mean and log variance",
        constructor=VaeEncoder,
        signature=encoder_signature,
        latent=(IMAGE_SIZE, IMAGE_SIZE),
        latent_multiple=pixels_per_latent,
        pixels_per_latent=1,
    ),
)
