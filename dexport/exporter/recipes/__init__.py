"""The registry: built-in recipes, the entry point group ``dexport.recipes``, and recipe files.

An entry point or a file offers a ``Recipe`` or a ``System``, or a sequence of them, under the name ``RECIPES`` or
``RECIPE``.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from dexport.errors import UsageError
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes import (
    dico,
    diffit,
    dimr,
    dit,
    fashion,
    fashion_masked,
    halton_maskgit,
    lit,
    llamagen_vq,
    mage,
    mage_vqgan,
    mar,
    mar_vae,
    maskgit_r,
    sd_vae,
    terdit,
    vitok_v1,
    vitok_v2,
)
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.recipes.system import System

ENTRY_POINT_GROUP = "dexport.recipes"
FAMILIES = (
    dit,
    dico,
    diffit,
    dimr,
    lit,
    terdit,
    halton_maskgit,
    mage,
    maskgit_r,
    mar,
    fashion,
    fashion_masked,
    sd_vae,
    vitok_v1,
    vitok_v2,
    llamagen_vq,
    mage_vqgan,
    mar_vae,
)
BUILT_IN = tuple(recipe for family in FAMILIES for recipe in family.RECIPES)


def all_buildable() -> dict[str, Recipe | System]:
    """Built-in and installed recipes and systems by name; an installed one may not shadow a built-in one."""
    found: dict[str, Recipe | System] = {recipe.name: recipe for recipe in BUILT_IN}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        for each in _as_buildable(point.load(), origin=f"entry point {point.name}"):
            if each.name in found:
                raise UsageError(
                    f"entry point {point.name} offers recipe {each.name!r}, which exists already", hint="rename it"
                )
            found[each.name] = each
    return found


def all_recipes() -> dict[str, Recipe]:
    """The recipes of networks among them."""
    return {name: each for name, each in all_buildable().items() if isinstance(each, Recipe)}


def find_buildable(name_or_path: str) -> Recipe | System:
    """A recipe or system by name, or the one in a Python file (``file.py``, or ``file.py:name`` of several)."""
    path, _, wanted = name_or_path.partition(".py")
    if name_or_path.endswith(".py") or wanted.startswith(":"):
        return _from_file(Path(path + ".py"), wanted.removeprefix(":"))
    return _registered(name_or_path)


def find_recipe(name_or_path: str) -> Recipe:
    """The recipe of a network; see :func:`find_buildable`.

    Raises:
        UsageError: there is none, or it is a system.
    """
    return _network(find_buildable(name_or_path))


def registered_recipe(name: str) -> Recipe:
    """A recipe of the registry by name; never a file. This is what names from manifests go through.

    Raises:
        UsageError: no such recipe.
    """
    return _network(_registered(name))


def _registered(name: str) -> Recipe | System:
    known = all_buildable()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`dexport recipes` lists them all"
    raise UsageError(f"no recipe named {name!r}", hint=hint)


def _network(found: Recipe | System) -> Recipe:
    if isinstance(found, System):
        networks = [each if isinstance(each, str) else each.name for some in found.roles.values() for each in some]
        raise UsageError(
            f"{found.name} is a system of several networks", hint=f"name one of {', '.join(dict.fromkeys(networks))}"
        )
    return found


@fresh_torch()  # a file may set defaults for its own network
def _from_file(path: Path, wanted: str) -> Recipe | System:
    if not path.is_file():
        raise UsageError(f"recipe file {path} does not exist", hint="`dexport recipes` lists those with a name")
    spec = importlib.util.spec_from_file_location(f"dexport_user_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"recipe file {path} failed to load: {type(error).__name__}: {error}", hint="correct the file"
        ) from error
    offered = getattr(module, "RECIPES", getattr(module, "RECIPE", None))
    recipes = {each.name: each for each in _as_buildable(offered, origin=str(path))}
    if not wanted and len(recipes) == 1:
        return next(iter(recipes.values()))
    if wanted not in recipes:
        raise UsageError(f"{path} has recipes {', '.join(recipes)}", hint=f"name one: {path}:{next(iter(recipes))}")
    return recipes[wanted]


def _as_buildable(offered: object, origin: str) -> list[Recipe | System]:
    kinds = (Recipe, System)
    found = [offered] if isinstance(offered, kinds) else list(offered) if isinstance(offered, Iterable) else []
    if not found or not all(isinstance(each, kinds) for each in found):
        raise UsageError(f"{origin} offers no dexport Recipe", hint="define RECIPE = Recipe(...) at module level")
    return found
