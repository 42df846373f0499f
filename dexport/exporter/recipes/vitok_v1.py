"""ViTok v1: encoders and decoders of images and videos. Files of the training hold both halves, each takes its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from dexport.errors import UsageError
from dexport.exporter.recipes.recipe import BATCH, Islands, Recipe, Signature, TensorSpec
from dexport.exporter.weights.checkpoint_view import without
from dexport.exporter.weights.source import WeightSource
from dexport.graphs.vitok_v1 import ViTokV1

WIDTHS = {"S": 768, "B": 768, "L": 1152, "H": 1312}
DEPTHS = {"S": 6, "B": 12, "L": 24, "H": 32}
HEADS = {"S": 12, "B": 12, "L": 16, "H": 16}
"""Both halves have the width and heads of the decoder."""
IMAGE = {"img_size": 256, "num_frames": 1, "posemb": "nope"}
VIDEO = {"img_size": 128, "num_frames": 16, "posemb": "sincos3d"}
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(ViTokV1).parameters.items()}

ENCODER = frozenset({"tubelet_embed", "encoder", "encoder_to_code", "posemb", "code", "enc_freqs"})
DECODER = frozenset({"code_to_decoder", "decoder", "tubelet_decode", "dec_posemb", "dec_freqs", "mask_token"})


def adapt(source: WeightSource, module: nn.Module) -> WeightSource:
    """The tensors of the module's halves."""
    assert isinstance(module, ViTokV1)
    others = (frozenset() if module.has_encoder else ENCODER) | (frozenset() if module.has_decoder else DECODER)
    return without(source, others, "ViTok v1")


def signature(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
    """image -> mean, logvar, or z -> image, or image -> recon; ``video`` for more frames than one.

    Args:
        size: of the image where there is an encoder, else of the grid of codes.

    Raises:
        UsageError: another grid than that of the model's positions.
    """
    s = {**DEFAULTS, **config}
    patch, frames = s["patch_size"], s["num_frames"] // s["tubelet_size"]
    is_image, side = s["num_frames"] == 1, s["img_size"] // s["patch_size"]
    height, width = (n // patch for n in size) if s["encoder"] else size
    if (height, width) != (side, side) and (s["posemb"] != "nope" or not s["simple"] or not is_image):
        raise UsageError(
            f"a grid of {height}x{width} tokens is not the {side}x{side} that this model has positions for",
            hint=f"--set img_size={height * patch}, with weights for it",
        )
    kind = "image" if is_image else "video"
    time = () if is_image else (frames * s["tubelet_size"],)
    picture = (BATCH, s["channels"], *time, height * patch, width * patch)
    tokens = frames * height * width if s["simple"] else s["code_length"]
    is_grid = is_image and s["simple"]
    code = (BATCH, s["code_width"], height, width) if is_grid else (BATCH, tokens, s["code_width"])
    inputs = [TensorSpec(kind, "float32", picture) if s["encoder"] else TensorSpec("z", "float32", code)]
    if s["decoder"] and s["lengths"] is not None:
        inputs.append(TensorSpec("token_count", "int64", (BATCH,), "integers", 1, tokens))
    if s["decoder"]:
        outputs = [TensorSpec("recon" if s["encoder"] else kind, "float32", picture)]
    else:
        outputs = [TensorSpec(name, "float32", code) for name in ("mean", "logvar")[: 2 if s["variational"] else 1]]
    return Signature(tuple(inputs), tuple(outputs))


def variant(sizes: str, tubelet: int, patch: int, half: str, **clip: Any) -> Recipe:
    """One half of ``S-B/1x16``: sizes of encoder and decoder, tubelet, patch."""
    encoder, decoder = sizes.split("-")
    is_encoder, is_image = half == "encoder", clip["num_frames"] == 1
    side = clip["img_size"] if is_encoder else clip["img_size"] // patch
    ends = ("tubelet_embed", "encoder_to_code") if is_encoder else ("code_to_decoder", "tubelet_decode")
    what = "images" if is_image else f"videos of {clip['num_frames']} frames"
    return Recipe(
        name=f"vitok-v1-{sizes.lower()}-{tubelet}x{patch}-{half}",
        family="ViTok v1",
        summary=f"ViTok v1 {sizes}/{tubelet}x{patch}, {half} of {what}, {clip['img_size']} px",
        source="philippe-eecs/vitok@7ff73e6",
        constructor=ViTokV1,
        config={
            "width": WIDTHS[decoder],
            "encoder_depth": DEPTHS[encoder],
            "decoder_depth": DEPTHS[decoder],
            "num_heads": HEADS[decoder],
            "tubelet_size": tubelet,
            "patch_size": patch,
            "simple": True,
            **clip,
            "encoder": is_encoder,
            "decoder": not is_encoder,
        },
        signature=signature,
        latent=(side, side),
        latent_multiple="patch_size" if is_encoder else 1,
        pixels_per_latent=1 if is_encoder else "patch_size",
        adapt=adapt,
        islands=Islands(optional=("rope",)),
        quantize_exclude=ends,
    )


HALVES = ("encoder", "decoder")
RECIPES = (
    *(variant(sizes, 1, 16, half, **IMAGE) for sizes in ("S-B", "B-B", "S-L", "S-H") for half in HALVES),
    *(variant("S-B", 4, 8, half, **VIDEO) for half in HALVES),
)
