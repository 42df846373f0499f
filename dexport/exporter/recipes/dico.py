"""DiCo S/B/L/XL/H. The weights do not depend on the resolution: 512 px is ``--image-size 512``."""

from __future__ import annotations

from dexport.exporter.recipes.denoiser import ENDS_AND_MODULATION, LINEAR_DDPM, class_conditional, first_channels
from dexport.exporter.recipes.recipe import Islands, Recipe
from dexport.graphs.dico import DiCo

SIZES = {
    "s": {"hidden_size": 128, "depth": [5, 4, 4, 4, 4], "mlp_ratio": 2},
    "b": {"hidden_size": 256, "depth": [5, 4, 4, 4, 4], "mlp_ratio": 2},
    "l": {"hidden_size": 352, "depth": [9, 8, 9, 8, 9], "mlp_ratio": 2},
    "xl": {"hidden_size": 416, "depth": [9, 9, 10, 9, 9], "mlp_ratio": 2},
    "h": {"hidden_size": 416, "depth": [14, 12, 10, 12, 14], "mlp_ratio": 4},
}
RELEASED = {
    "s": ("DiCo-S-400K-256x256.pt",),
    "b": ("DiCo-B-400K-256x256.pt",),
    "l": ("DiCo-L-400K-256x256.pt",),
    "xl": ("DiCo-XL-3750K-256x256.pt", "DiCo-XL-400K-256x256.pt"),
}
HUB = "hf://shallowdream204/DiCo/"


def variant(size: str, image_size: int = 256) -> Recipe:
    latent = image_size // 8
    files = RELEASED.get(size, ()) if image_size == 256 else ()
    return Recipe(
        name=f"dico-{size}" + ("" if image_size == 256 else f"-{image_size}"),
        family="DiCo",
        summary=f"DiCo-{size.upper()}, {image_size} px",
        source="shallowdream204/DiCo@b596b05",
        constructor=DiCo,
        config=SIZES[size],
        signature=class_conditional,
        latent=(latent, latent),
        latent_multiple=4,
        sampling=LINEAR_DDPM,
        guidance=first_channels(default_scale=1.4),
        checkpoints=files,
        hub=HUB + files[0] if files else "",
        ops=("DexChannelAttention",),
        islands=Islands(modules=("t_embedder_*",)),
        quantize_exclude=ENDS_AND_MODULATION,
    )


RECIPES = (*(variant(size) for size in SIZES), variant("xl", image_size=512))
