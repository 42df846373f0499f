"""Small models with trained weights in ``checkpoints/``: the official networks on 32 px Fashion-MNIST.

Trained by ``tools/train_fashion.py``. Images are padded to 32 px and pixel-unshuffled to (4, 16, 16), so that the
shapes are of the kind of the official latents and no decoder is needed. Guidance covers all four channels of the
prediction, as each is one pixel in four of the image: the first three only would draw a checkerboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dexport.contract import PIXELS, Decoding
from dexport.exporter.recipes import dico, diffit, dit, lit, mage_vqgan, mar, maskgit_r, terdit
from dexport.exporter.recipes.denoiser import LINEAR_DDPM, require_null_label
from dexport.exporter.recipes.recipe import Guidance, Recipe, Sampling, Signature
from dexport.runtime.programs.program import Program

SIDE = 16

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SAMPLING = replace(LINEAR_DDPM, steps=50, latent_scale=1.0, decoder="pixel-shuffle-2", class_names=CLASSES)


THUMBNAILS = replace(SAMPLING, decoder="pixel-shuffle-2-tiles-4")
"""TerDiT knows positions only by rotary distances, which say nothing to tokens that are all noise: a small one draws
its garments shifted. So each of its 16 patches is a thumbnail of the whole picture, and a shift is one of pixels."""


def variant(name: str, like: Recipe, sampling: Sampling = SAMPLING, **config: Any) -> Recipe:
    """A small relative of the recipe ``like``."""
    if like.size_argument is not None:
        config[like.size_argument] = SIDE
    return replace(
        like,
        name=name,
        summary=f"{like.family}, trained on 32 px Fashion-MNIST",
        config={"num_classes": len(CLASSES), **config},
        latent=(SIDE, SIDE),
        pixels_per_latent=2,
        sampling=sampling,
        guidance=Guidance("first four channels", 2.0, require_null_label),
        checkpoints=(f"{name}.safetensors",),
        hub="checkpoints/ of the dexport repository",
    )


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
    "diffloss_d": 3,
    "diffloss_w": 128,
}
RECIPES = (
    variant("dico-fashion", dico.RECIPES[0], hidden_size=48, depth=[2, 2, 2, 2, 2], mlp_ratio=2),
    variant("dico-fashion-s", dico.RECIPES[0], hidden_size=32, depth=[1, 2, 2, 2, 1], mlp_ratio=2),
    variant("dit-fashion", dit.RECIPES[0], patch_size=2, hidden_size=128, depth=8, num_heads=4),
    variant("dit-fashion-s", dit.RECIPES[0], patch_size=2, hidden_size=96, depth=6, num_heads=3),
    variant("diffit-fashion", diffit.RECIPES[0], patch_size=2, hidden_size=128, depth=6, num_heads=4),
    variant("lit-fashion", lit.RECIPES[0], patch_size=2, hidden_size=128, depth=6, num_heads=2),
    variant(
        "terdit-fashion", terdit.RECIPES[0], THUMBNAILS, patch_size=4, dim=160, n_layers=6, n_heads=4, multiple_of=64
    ),
    masked("mage-vqgan-fashion-encoder", mage_vqgan.RECIPES[0], 32, VQGAN, "mage-vqgan-fashion"),
    masked("mage-vqgan-fashion-decoder", mage_vqgan.RECIPES[1], 8, VQGAN, "mage-vqgan-fashion"),
    masked(
        "maskgit-r-fashion",
        maskgit_r.RECIPES[0],
        8,
        UVIT,
        steps=16,
        cfg_scale=2.0,
        cfg_start=1.0,
        decoding=Decoding("network", "mage-vqgan-fashion-decoder", black=0.0),
    ),
    masked("mar-fashion", mar.RECIPES[0], 32, MAR, steps=32, cfg_scale=2.0, decoding=PIXELS),
)
