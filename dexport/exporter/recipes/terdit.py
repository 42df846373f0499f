"""TerDiT 600M, 4.2B and the unreleased 7B: diffusion transformers with ternary weights, at 256 and 512 px."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dexport.errors import InputError
from dexport.exporter.recipes.denoiser import LINEAR_DDPM, class_conditional, first_channels
from dexport.exporter.recipes.recipe import Islands, Recipe
from dexport.exporter.weights.checkpoint_view import Entry, View, stored
from dexport.exporter.weights.source import WeightSource
from dexport.graphs.terdit import TerDiT, TernaryLinear, ternarise
from dexport.plugins.ternary_matmul.packing import VALUES_PER_BYTE, unpack

SIZES = {
    "600m": {"dim": 1536, "n_layers": 16, "n_heads": 32},
    "4.2b": {"dim": 3072, "n_layers": 32, "n_heads": 32},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32},
}
PATCH = 2


def adapt(source: WeightSource, module: nn.Module) -> WeightSource:
    """A checkpoint with ternary values, whether it stores four to a byte (as released) or master weights (training)."""
    entries = {name: stored(source, name) for name in source.shapes}
    layout = "master weights"
    for path, layer in module.named_modules():
        name = f"{path}.weight"
        if not isinstance(layer, TernaryLinear) or name not in source.shapes:
            continue
        rows, columns = layer.weight.shape
        if source.shapes[name] == (rows // VALUES_PER_BYTE, columns):
            layout = "packed ternary"
            entries[name] = Entry((rows, columns), partial(_unpacked, source, name))
        elif source.shapes[name] == (rows, columns):
            entries[name] = Entry((rows, columns), partial(_ternarised, source, name))
    return View(source, entries, layout)


def _unpacked(source: WeightSource, name: str) -> Tensor:
    values = unpack(source._read(name))
    if values.max() > 1:
        raise InputError(
            f"{source.origin}: {name} holds codes that are no ternary values", hint="copy or download it again"
        )
    return values


def _ternarised(source: WeightSource, name: str) -> Tensor:
    return ternarise(source.read(name, torch.float32))


def variant(size: str, image_size: int = 256) -> Recipe:
    side = image_size // 8
    return Recipe(
        name=f"terdit-{size}" + ("" if image_size == 256 else f"-{image_size}"),
        family="TerDiT",
        summary=f"TerDiT-{size.upper()}, {image_size} px, ternary weights",
        source="Lucky-Lance/TerDiT@825f1f2",
        constructor=TerDiT,
        config={"input_size": side, "patch_size": PATCH, **SIZES[size]},
        signature=class_conditional,
        latent=(side, side),
        latent_multiple="patch_size",
        size_argument="input_size",
        sampling=LINEAR_DDPM,
        guidance=first_channels(default_scale=1.5),
        adapt=adapt,
        islands=Islands(modules=("t_embedder", "layers.*.adaLN_modulation.2")),
    )


RECIPES = tuple(variant(size, image_size) for image_size in (256, 512) for size in SIZES)
