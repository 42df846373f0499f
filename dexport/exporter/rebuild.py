"""Build an existing bundle again, from what its manifest records: with quantised weights, or with more islands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dexport.bundle import Bundle
from dexport.errors import InputError, UsageError
from dexport.exporter.options import BuildOptions, Player
from dexport.exporter.origin import same_weights, variant_of, weights_of
from dexport.exporter.quantize.ternary import AUTO, ternary_layers
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.system import facts_of
from dexport.exporter.trajectory import program_of
from dexport.exporter.variant import Variant
from dexport.profiles import builtin_profiles
from dexport.runtime import opened


def options_of(
    bundle: Bundle,
    output: Path,
    *,
    checkpoint: str | None = None,
    recipe: Recipe | None = None,
    profile: str | None = None,
    **choices: Any,
) -> tuple[Recipe, BuildOptions]:
    """The recipe and the options that a bundle was built with, and what is to be different.

    Args:
        bundle: a bundle whose hashes have been checked.
        checkpoint: where the weights are now, if not where they were.
        recipe: for a bundle that was built from a recipe of one's own.
        profile: for a bundle that was built with a profile of one's own.
        choices: fields of :class:`BuildOptions` about quantisation, and ``parity`` and ``force``.

    Raises:
        UsageError: several networks of one role, nothing to do, or a checkpoint, recipe or profile that is not there.
        InputError: the checkpoint is not the one that the bundle was built from, or the manifest is incomplete.
    """
    role = bundle.network.role
    count = len(bundle.roles[role])
    if count > 1:
        raise UsageError(
            f"{bundle.path} holds {count} networks of the role {role}, and each is quantised by itself",
            hint="quantise a bundle of each, then join them with dexport build --stitch PART:SHARE,...",
        )
    if not any(choices.get(name) is not None for name in ("int8", "ternary", "precision_map", "budget")):
        raise UsageError("nothing says how to quantise", hint="give --quantize, such as --quantize int8")
    given = {name: value for name, value in choices.items() if value is not None}
    found, recorded = recorded_options(bundle, output, checkpoint, recipe, profile)
    if given.get("ternary") is False:  # dense weights need no carrier
        recorded = replace(recorded, ternary_carrier=AUTO)
    return found, replace(recorded, **given)


def recorded_options(
    bundle: Bundle,
    output: Path,
    checkpoint: str | None = None,
    recipe: Recipe | None = None,
    profile: str | None = None,
) -> tuple[Recipe, BuildOptions]:
    """The recipe and the options that a bundle was built with, but for its quantisation; see :func:`options_of`."""
    try:
        return _recorded(bundle, output, checkpoint, recipe, profile)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{bundle.path}: the manifest lacks what a build needs: {error}", hint="build the bundle again"
        ) from error


def _recorded(
    bundle: Bundle, output: Path, checkpoint: str | None, recipe: Recipe | None, profile: str | None
) -> tuple[Recipe, BuildOptions]:
    m = bundle.network.manifest
    variant = variant_of(bundle.network, recipe)
    _check_system(bundle, variant)
    recipe, origin = variant.recipe, m["weights"]
    weights_of(origin, variant, checkpoint)  # the right file, or an error
    path = None if origin["kind"] == "random" else same_weights(origin, checkpoint)
    inherited = origin["kind"] == "inherited"
    islands = (m["precision"]["islands"] or {"modules": ()})["modules"]
    recorded: dict[str, Any] = {
        "checkpoint": None if inherited else path,
        "init_from": path if inherited else None,
        "seed": origin["seed"] or 0,
        "settings": dict(m["config"]),
        "latent": variant.latent,
        "graphs": variant.graphs,
        "fold_steps": variant.table and variant.table.steps,
        "precision": m["precision"]["name"],
        "islands": tuple(module for module in islands if module not in recipe.islands.modules),
        "opset": m["opset"],
        "no_passes": tuple(m.get("no_passes", ())),
        "profile": profile or _profile_of(bundle),
        "accept_loss": bundle.manifest.get("accepted_loss") is True,
        "players": {role: (Player(str(bundle.path)),) for role in bundle.roles if role != bundle.network.role},
    }
    if m["ternary"] is not None:
        recorded["ternary_carrier"] = m["ternary"]["carrier"]
    elif ternary_layers(variant):
        recorded["ternary"] = False
    graph = bundle.network.entry()
    if graph["engine"] is not None:
        recorded |= {
            "trt": True,
            "engine": graph["engine"]["flavour"],
            "targets": tuple(graph["engine"]["targets"]),
            "plugins": "on" if any(op["ptx_sha256"] for op in graph["custom_ops"]) else "off",
        }
    return recipe, BuildOptions(output=output, **recorded)


def _check_system(bundle: Bundle, variant: Variant) -> None:
    """Refuse a bundle of a system that is more than its main network's recipe: it would be built without it."""
    recorded, alone = None if bundle.program is None else opened.program_of(bundle), program_of(variant)
    if (recorded and facts_of(recorded)) != (alone and facts_of(alone)):
        raise UsageError(
            f"{bundle.path} was built as another system than the recipe {variant.recipe.name} describes",
            hint="build that system again with the new options: dexport build SYSTEM --quantize SPEC",
        )


def _profile_of(bundle: Bundle) -> str:
    name = bundle.network.manifest["profile"]
    if name not in builtin_profiles():
        raise UsageError(
            f"{bundle.path} was built with the profile {name!r}, which is a file of your own",
            hint="give it with --profile FILE.toml",
        )
    return name
