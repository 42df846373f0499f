"""The network of a build, settled as a build settles it before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dexport.exporter.options import BuildOptions
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.system import plan_system
from dexport.exporter.variant import Variant


def resolved(recipe: str | Recipe, **options: Any) -> Variant:
    """The main network of a recipe and options; whatever a build refuses by them is refused."""
    variant = plan_system(recipe, BuildOptions(Path("out"), **options)).parts[0].variant
    assert variant is not None
    return variant
