"""DiT S/B/L/XL with patch 2/4/8, at 256 and 512 px."""

from __future__ import annotations

from dexport.exporter.recipes.denoiser import ENDS_AND_MODULATION, LINEAR_DDPM, class_conditional, first_channels
from dexport.exporter.recipes.recipe import Islands, Recipe
from dexport.graphs.dit import DiT

SIZES = {
    "s": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "b": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "l": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "xl": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
OFFICIAL_FILES = "https://dl.fbaipublicfiles.com/DiT/models/"


def variant(size: str, patch: int, image_size: int = 256) -> Recipe:
    latent = image_size // 8
    released = size == "xl" and patch == 2
    file = f"DiT-XL-2-{image_size}x{image_size}.pt"
    return Recipe(
        name=f"dit-{size}-{patch}" + ("" if image_size == 256 else f"-{image_size}"),
        family="DiT",
        summary=f"DiT-{size.upper()}/{patch}, {image_size} px",
        source="facebookresearch/DiT@ed81ce2",
        constructor=DiT,
        config={"input_size": latent, "patch_size": patch, **SIZES[size]},
        signature=class_conditional,
        latent=(latent, latent),
        latent_multiple="patch_size",
        size_argument="input_size",
        sampling=LINEAR_DDPM,
        guidance=first_channels(default_scale=1.5),
        checkpoints=(file,) if released else (),
        hub=OFFICIAL_FILES + file if released else "",
        islands=Islands(modules=("t_embedder",)),
        quantize_exclude=ENDS_AND_MODULATION,
    )


RECIPES = (*(variant(size, patch) for size in SIZES for patch in (2, 4, 8)), variant("xl", 2, image_size=512))
