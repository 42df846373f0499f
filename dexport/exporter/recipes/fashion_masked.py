"""Small masked generators with trained weights in ``checkpoints/``, and their tokenizer: 32 px Fashion-MNIST.

Trained by ``tools/train_masked.py``. MaskGIT-r draws 64 ids of a VQGAN of MAGE's kind; MAR draws 64 tokens of 4 x 4
pixels each, and needs no decoder. Its inner diffusion starts at 980 of 1000: before that, errors of the prediction are
magnified by more than 50, which a small network cannot afford.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dexport.contract import PIXELS, Decoding
from dexport.exporter.recipes import mage_vqgan, mar, maskgit_r
from dexport.exporter.recipes.fashion import CLASSES
from dexport.exporter.recipes.recipe import Recipe, Signature
from dexport.runtime.programs.program import Program

TOKENIZER = "mage-vqgan-fashion"
VQGAN = {
    "n_embed": 256,
    "embed_dim": 32,
    "z_channels": 32,
    "ch": 32,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "in_channels": 1,
    "out_ch": 1,
    "grid": [8, 8],
}
UVIT = {
    "img_size": 8,
    "codebook_size": VQGAN["n_embed"],
    "embed_dim": 128,
    "depth": 8,
    "num_heads": 4,
    "num_classes": len(CLASSES) + 1,
    "group_size": 20,
}
HALVES = {"embed_dim": 128, "depth": 3, "num_heads": 4}
MAR = {
    **mar.RECIPES[0].config,
    "img_size": 32,
    "vae_stride": 1,
    "vae_embed_dim": 1,
    "patch_size": 4,
    "buffer_size": 8,
    "class_num": len(CLASSES),
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in HALVES.items()},
    "light_tokens": 12,
    "diffloss_d": 3,
    "diffloss_w": 128,
}


def masked(name: str, like: Recipe, cells: int, config: dict[str, Any], checkpoint: str = "", **program: Any) -> Recipe:
    """A small relative of a recipe that draws tokens, or of one half of their tokenizer.

    Args:
        program: fields of the program that are not those of ``like``.
    """

    def own(config: Mapping[str, Any], signatures: Mapping[str, Signature]) -> Program:
        assert like.program is not None
        usual = like.program(config, signatures)
        return replace(usual, condition=msgspec.structs.replace(usual.condition, names=CLASSES), **program)

    return replace(
        like,
        name=name,
        summary=f"{like.family}, trained on 32 px Fashion-MNIST",
        config=config,
        latent=(cells, cells),
        program=own if program else None,
        checkpoints=(f"{checkpoint or name}.safetensors",),
        hub="checkpoints/ of the dexport repository",
    )


RECIPES = (
    masked(f"{TOKENIZER}-encoder", mage_vqgan.RECIPES[0], 32, VQGAN, TOKENIZER),
    masked(f"{TOKENIZER}-decoder", mage_vqgan.RECIPES[1], 8, VQGAN, TOKENIZER),
    masked(
        "maskgit-r-fashion",
        maskgit_r.RECIPES[0],
        8,
        UVIT,
        steps=16,
        cfg_scale=2.0,
        cfg_start=1.0,
        decoding=Decoding("network", f"{TOKENIZER}-decoder", black=0.0),
    ),
    masked(
        "mar-fashion",
        mar.RECIPES[0],
        32,
        MAR,
        steps=32,
        cfg_scale=2.0,
        respacing="ddim50",
        light_respacing="ddim20",
        decoding=PIXELS,
    ),
)
