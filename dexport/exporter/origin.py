"""What a bundle was built from, as its manifest says: the variant, and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dexport.bundle import Network, reading_manifest
from dexport.contract import TIME
from dexport.errors import UsageError
from dexport.exporter.recipes import registered_recipe
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.variant import TimeTable, Variant
from dexport.exporter.weights.address import CONTAINER
from dexport.exporter.weights.containers import address_of
from dexport.exporter.weights.inherit import inherit_weights
from dexport.exporter.weights.loading import open_weights
from dexport.exporter.weights.source import WeightSource


def variant_of(network: Network, recipe: Recipe | None = None, graph: str = "") -> Variant:
    """The variant that a manifest describes.

    Args:
        recipe: for a network that was built from a recipe of one's own.
        graph: by name; by default the main one.

    Raises:
        UsageError: it is another one than the manifest's, or the manifest's is not in the registry: what a manifest
            names is looked up there and nowhere else.
        InputError: the manifest is incomplete.
    """
    manifest = network.manifest
    with reading_manifest(network.bundle):
        height, width = manifest["latent"]
        name = str(manifest["recipe"]["name"])
        config, steps = manifest["config"], manifest["folded"]
    recipe = recipe or _recorded_recipe(name)
    if recipe.name != name:
        raise UsageError(
            f"the bundle was built from the recipe {name!r}, and {recipe.name!r} was given",
            hint=f"give the file of {name!r} with --recipe",
        )
    variant = Variant(recipe, config, (height, width), tuple(network.graphs), graph or network.main_graph)
    if steps is None:
        return variant
    times = [port.choices for each in network.graphs.values() if (port := each.input(TIME)) is not None]
    return replace(variant, table=TimeTable(steps, times[0]))


def _recorded_recipe(name: str) -> Recipe:
    try:
        return registered_recipe(name)
    except UsageError as error:
        raise UsageError(
            f"no recipe named {name!r} is installed here, and the bundle was built from it",
            hint="give its file with --recipe FILE.py, if you trust who wrote it",
        ) from error


def weights_of(origin: Mapping[str, Any], variant: Variant, checkpoint: str | None = None) -> WeightSource:
    """The weights that a manifest names; a file must have the hash that it had."""
    module, seed = variant.outline, origin["seed"] or 0
    if origin["kind"] == "random":
        return open_weights(None, module, seed=seed, adapt=variant.recipe.adapt)
    path = Path(checkpoint or origin["path"])
    if not path.is_file():
        raise UsageError(
            f"the bundle was built from {origin['path']}, which is not there", hint="give its place with --checkpoint"
        )
    address = same_weights(origin, checkpoint)
    if origin["kind"] == "inherited":
        return inherit_weights(address, module, variant.recipe.not_inherited, seed, origin["sha256"])
    return open_weights(address, module, adapt=variant.recipe.adapt, sha256=origin["sha256"])


def same_weights(origin: Mapping[str, Any], checkpoint: str | None = None) -> str:
    """The address of the state dict that a manifest names, in its file or in a copy of it elsewhere."""
    path, container = checkpoint or origin["path"], str(origin.get("container", ""))
    return f"{path}{CONTAINER}{address_of(container)}" if container else path
