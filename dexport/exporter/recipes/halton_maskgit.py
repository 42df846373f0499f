"""Halton-MaskGIT T, S, B, L, XL at 256 and 384 px: pictures as 16x16 or 24x24 ids of LlamaGen's VQ-16.

The text-to-image network is unreleased: it has the sizes of its file in the official repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dexport.contract import DROP, LABEL, LOGITS, STATE, Condition, Decoding
from dexport.exporter.recipes.recipe import BATCH, Guidance, Islands, Recipe, Signature, TensorSpec
from dexport.graphs.halton_maskgit import HaltonMaskGIT
from dexport.graphs.halton_text import HaltonTextMaskGIT
from dexport.runtime.programs.masked import Masked

PIXELS_PER_CODE = 16
CODES = 16384
TEXT_TOKENS = 120
DECODER = "llamagen-vq16-decoder"
SIZES: Mapping[str, tuple[str, dict[str, int], float]] = {
    "t": ("tiny", {"hidden_dim": 384, "depth": 6, "heads": 6}, 1.5),
    "s": ("small", {"hidden_dim": 512, "depth": 12, "heads": 6}, 1.0),
    "b": ("base", {"hidden_dim": 768, "depth": 12, "heads": 12}, 0.7),
    "l": ("large", {"hidden_dim": 1024, "depth": 24, "heads": 16}, 0.5),
    "xl": ("xlarge", {"hidden_dim": 1152, "depth": 28, "heads": 16}, 0.5),
}
"""Name in official files, constructor arguments, and the guidance w of the official table; XL's is that of L."""
RELEASED = {("t", 256), ("s", 256), ("b", 256), ("s", 384), ("b", 384), ("l", 384)}


def signature(config: Mapping[str, Any], grid: tuple[int, int]) -> Signature:
    """codes, labels, drop_label -> logits."""
    codes, classes = config["codebook_size"], config["nclass"]
    return Signature(
        inputs=(
            TensorSpec("codes", "int64", (BATCH, *grid), "integers", 0, codes, role=STATE),
            TensorSpec("labels", "int64", (BATCH,), "integers", 0, classes - 1, role=LABEL),
            TensorSpec("drop_label", "bool", (BATCH,), "integers", 0, 1, role=DROP),
        ),
        outputs=(TensorSpec("logits", "float32", (BATCH, grid[0] * grid[1], codes + 1), role=LOGITS),),
    )


def program(scale: float, config: Mapping[str, Any]) -> Masked:
    """Sampling as the official evaluation script does it: 32 steps in Halton order, half the temperature in the first.

    Source: ``launch/run_cls_to_img.sh`` and the table of the README.
    """
    codes, classes = config["codebook_size"], config["nclass"]
    return Masked(
        condition=Condition("class", classes, null=classes),
        codes=codes,
        mask=codes,
        order="halton",
        steps=min(32, config["input_size"] ** 2),
        cfg_scale=scale,
        warmup=1,
        decoding=Decoding("network", DECODER),
    )


def variant(size: str, image_size: int = 256) -> Recipe:
    official, sizes, w = SIZES[size]
    side = image_size // PIXELS_PER_CODE
    file = f"ImageNet_{image_size}_{official}.pth"
    released = (size, image_size) in RELEASED
    scale = round(1 + w, 6)
    return Recipe(
        name=f"halton-maskgit-{size}" + ("" if image_size == 256 else f"-{image_size}"),
        family="Halton-MaskGIT",
        summary=f"Halton-MaskGIT-{size.upper()}, {image_size} px, ids of LlamaGen's VQ-16",
        source="valeoai/Halton-MaskGIT@f61b0a1",
        constructor=HaltonMaskGIT,
        config={
            "input_size": side,
            "codebook_size": CODES,
            **sizes,
            "mlp_dim": 4 * sizes["hidden_dim"],
            "nclass": 1000,
            "register": 1,
            "proj": 1,
        },
        signature=signature,
        latent=(side, side),
        size_argument="input_size",
        pixels_per_latent=PIXELS_PER_CODE,
        program=lambda config, _: program(scale, config),
        guidance=Guidance("all channels", scale, lambda config: config["nclass"]),
        checkpoints=(file,) if released else (),
        hub=f"hf://llvictorll/Halton-Maskgit/{file}" if released else "",
        islands=Islands(modules=("*.ln1", "*.ln2", "*.query_norm", "*.key_norm", "last_norm.norm_final")),
        # The table of the tokens makes the logits as well.
        quantize_exclude=("tok_emb", "cls_emb", "pos_emb", "head", "*.mlp", "last_norm"),
    )


def text_signature(config: Mapping[str, Any], grid: tuple[int, int]) -> Signature:
    """codes, text, drop_label -> logits."""
    codes = config["codebook_size"]
    return Signature(
        inputs=(
            TensorSpec("codes", "int64", (BATCH, *grid), "integers", 0, codes, role=STATE),
            TensorSpec("text", "float32", (BATCH, TEXT_TOKENS, config["cond_dim"])),
            TensorSpec("drop_label", "bool", (BATCH,), "integers", 0, 1, role=DROP),
        ),
        outputs=(TensorSpec("logits", "float32", (BATCH, grid[0] * grid[1], codes + 1), role=LOGITS),),
    )


TEXT = Recipe(
    name="halton-maskgit-text",
    family="Halton-MaskGIT",
    summary="The network of the text-to-image Halton-MaskGIT, 512 px; takes embeddings of 120 tokens, runs by itself",
    source="valeoai/Halton-MaskGIT@f61b0a1",
    constructor=HaltonTextMaskGIT,
    config={
        "input_size": 32,
        "c": 1024,
        "hidden_dim": 1024,
        "cond_dim": 2048,
        "codebook_size": CODES,
        "depth": 24,
        "heads": 16,
        "mlp_dim": 4096,
        "proj": 2,
    },
    signature=text_signature,
    latent=(32, 32),
    latent_multiple="proj",
    size_argument="input_size",
    pixels_per_latent=PIXELS_PER_CODE,
    quantize_exclude=("tok_emb", "pos_emb", "in_proj", "out_proj"),
)

RECIPES = (*(variant(size, image_size) for image_size in (256, 384) for size in SIZES), TEXT)
