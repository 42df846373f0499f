"""A recipe as JSON values, for ``dexport recipes`` and ``dexport info``."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

from dexport.contract import to_json
from dexport.exporter.recipes import registered_recipe
from dexport.exporter.recipes.diffusion import graphs_of
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.recipes.system import System
from dexport.exporter.trajectory import program_of
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.address import SUFFIXES
from dexport.exporter.weights.containers import CONTAINERS


def describe(found: Recipe | System) -> dict[str, Any]:
    """Everything a user may want to know before building; a system has ``roles``."""
    return describe_recipe(found) if isinstance(found, Recipe) else describe_system(found)


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Everything a user may want to know before building; parameters are counted, not recorded."""
    variant = resolve(recipe)
    signature = variant.signature
    program = program_of(variant)
    return {
        "name": recipe.name,
        "family": recipe.family,
        "summary": recipe.summary,
        "source": recipe.source,
        "parameters": count_parameters(variant),
        "settings": {**_defaults(recipe), **recipe.config},
        "graphs": list(graphs_of(recipe)),
        "inputs": [to_json(spec.port) for spec in signature.inputs],
        "outputs": [to_json(spec.port) for spec in signature.outputs],
        "checkpoint": {
            "files": list(recipe.checkpoints),
            "from": recipe.hub,
            "formats": list(SUFFIXES),
            "containers": ["the state dict itself", *CONTAINERS],
        },
        "custom_ops": list(recipe.ops),
        "islands": asdict(recipe.islands),
        "quantize_exclude": list(recipe.quantize_exclude),
        "gates_relative_l2": dict(recipe.gates),
        "program": program and program.to_json(),
    }


def describe_system(system: System) -> dict[str, Any]:
    """A system as JSON values: who plays its roles, and its program."""
    roles = {
        role: [each if isinstance(each, Recipe) else registered_recipe(each) for each in recipes]
        for role, recipes in system.roles.items()
    }
    networks = {role: [resolve(each) for each in recipes] for role, recipes in roles.items()}
    return {
        "name": system.name,
        "family": system.family,
        "summary": system.summary,
        "source": system.source,
        "roles": {role: [each.name for each in recipes] for role, recipes in roles.items()},
        "parameters": sum(count_parameters(each) for some in networks.values() for each in some),
        "program": system.program(networks).to_json(),
    }


def count_parameters(variant: Variant) -> int:
    """Number of floating-point values in the state dict; index tables do not count, and tied weights count once."""
    tensors = {id(tensor): tensor for tensor in variant.outline.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def _defaults(recipe: Recipe) -> dict[str, Any]:
    parameters = inspect.signature(recipe.constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
