"""ViTok v2: the released encoders and decoders.

They take images of a fixed size or, with ``--set naflex=true``, tokens of images of any shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from dexport.exporter.recipes.recipe import BATCH, Islands, Recipe, Signature, TensorSpec
from dexport.exporter.weights.checkpoint_view import without
from dexport.exporter.weights.source import WeightSource
from dexport.graphs.vitok_v2 import ViTokV2

IMAGE_SIZE = 256
CHANNELS = 3
SIZES = {
    "350M": {
        "encoder_width": 1024,
        "encoder_heads": 16,
        "decoder_width": 1024,
        "decoder_depth": 24,
        "decoder_heads": 16,
    },
    "5B": {"encoder_width": 3072, "encoder_heads": 24, "decoder_width": 3072, "decoder_depth": 40, "decoder_heads": 24},
}
RELEASED = {
    "350M": {16: (16, 32, 64)},
    "5B": {16: (16, 32, 64), 32: (64, 128, 256)},
}
"""Size -> spatial stride -> channels per token."""
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(ViTokV2).parameters.items()}

ENCODER = frozenset({"patch_embed", "to_code", "encoder_blocks"})
DECODER = frozenset({"decoder_embed", "to_pixels", "decoder_blocks"})


def adapt(source: WeightSource, module: nn.Module) -> WeightSource:
    """The tensors of the module's halves: released files hold one, training ones both."""
    assert isinstance(module, ViTokV2)
    others = (frozenset() if module.has_encoder else ENCODER) | (frozenset() if module.has_decoder else DECODER)
    return without(source, others, "ViTok v2")


def signature(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
    """image -> z, z -> image, or image -> recon; with ``naflex`` the same of tokens and their places.

    Args:
        size: of the image where there is an encoder, else of the grid. With ``naflex`` it only says how many tokens.
    """
    s = {**DEFAULTS, **config}
    stride, code, pixels = s["spatial_stride"], s["channels_per_token"], s["pixels_per_token"]
    height, width = (n // stride for n in size) if s["encoder"] else size
    if not s["naflex"]:
        image = (BATCH, pixels // stride**2, height * stride, width * stride)
        z = (BATCH, code, height, width)
        given = TensorSpec("image", "float32", image) if s["encoder"] else TensorSpec("z", "float32", z)
        name = ("recon" if s["encoder"] else "image") if s["decoder"] else "z"
        return Signature((given,), (TensorSpec(name, "float32", image if s["decoder"] else z),))
    places = (BATCH, height * width)
    first, channels = ("patches", pixels) if s["encoder"] else ("z", code)
    inputs = [
        TensorSpec(first, "float32", (*places, channels)),
        # Images of other proportions have as many tokens in more rows, or in more columns.
        TensorSpec("row_idx", "int64", places, "integers", 0, height - 1, largest=height * width - 1),
        TensorSpec("col_idx", "int64", places, "integers", 0, width - 1, largest=height * width - 1),
    ]
    if s["attn_backend"] == "sdpa":
        inputs.append(TensorSpec("patch_mask", "int64", places, "integers", 0, 1))
    last, channels = ("patches_out", pixels) if s["decoder"] else ("z", code)
    return Signature(tuple(inputs), (TensorSpec(last, "float32", (*places, channels)),))


def variant(size: str, stride: int, channels: int, half: str) -> Recipe:
    is_encoder = half == "encoder"
    name, side = f"{size}-f{stride}x{channels}", IMAGE_SIZE if is_encoder else IMAGE_SIZE // stride
    ends = ("patch_embed", "to_code") if is_encoder else ("decoder_embed", "to_pixels")
    return Recipe(
        name=f"vitok-v2-{name.lower()}-{half}",
        family="ViTok v2",
        summary=f"ViTok v2 {name}, {half}",
        source="Na-VAE/vitok-release@a90f23b",
        constructor=ViTokV2,
        config={
            **SIZES[size],
            "encoder_depth": 4,
            "spatial_stride": stride,
            "channels_per_token": channels,
            "pixels_per_token": CHANNELS * stride * stride,
            "attn_backend": "sdpa",
            "encoder": is_encoder,
            "decoder": not is_encoder,
        },
        signature=signature,
        latent=(side, side),
        latent_multiple="spatial_stride" if is_encoder else 1,
        pixels_per_latent=1 if is_encoder else "spatial_stride",
        checkpoints=(f"{half}.safetensors",),
        hub=f"hf://philippehansen/ViTok-v2-{name}/{half}.safetensors",
        adapt=adapt,
        islands=Islands(optional=("*.norm1", "*.norm_q", "*.norm_k", "encoder_rope", "decoder_rope")),
        quantize_exclude=ends,
    )


RECIPES = tuple(
    variant(size, stride, channels, half)
    for size, strides in RELEASED.items()
    for stride, widths in strides.items()
    for channels in widths
    for half in ("encoder", "decoder")
)
