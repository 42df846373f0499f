"""A recipe of one's own: ``dexport build examples/my_dit.py --checkpoint my-dit.safetensors``.

This DiT was trained on 10 classes of 128 px images. Start from the recipe that is nearest, or fill in a Recipe from
scratch with a constructor of your own: any function that returns a module will do.
"""

from dataclasses import replace

from dexport.exporter.recipes import find_recipe

RECIPE = replace(
    find_recipe("dit-s-2"),
    name="my-dit",
    summary="DiT-S/2 with a width of 192, 128 px, 10 classes",
    config={"input_size": 16, "patch_size": 2, "depth": 6, "hidden_size": 192, "num_heads": 3, "num_classes": 10},
    latent=(16, 16),
    checkpoints=("my-dit.safetensors",),
    hub="",
)
