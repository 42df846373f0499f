"""Small models with trained weights in ``checkpoints/``: the official networks on 32 px Fashion-MNIST.

Trained by ``tools/train_fashion.py``. Images are padded to 32 px and pixel-unshuffled to (4, 16, 16), so that the
shapes are of the kind of the official latents and no decoder is needed. Guidance covers all four channels of the
prediction, as each is one pixel in four of the image: the first three only would draw a checkerboard.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dexport.exporter.recipes import dico, diffit, dit, lit, terdit
from dexport.exporter.recipes.denoiser import LINEAR_DDPM, require_null_label
from dexport.exporter.recipes.recipe import Guidance, Recipe, Sampling

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
)
