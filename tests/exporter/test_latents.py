"""Configurations that change what is made of a denoiser's output: the facts follow, or the build is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dexport.runtime.pipeline import Pipeline

import dexport
from dexport.errors import UsageError
from dexport.exporter.build import BuildOptions, resolve_options
from dexport.exporter.manifest import sampling
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.fashion import CLASSES
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.variant import resolve
from dexport.runtime.generate import generate

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2}
BRANCH = find_recipe("dimr-xl-2r").config["stage_configs"][0]


def options(settings: dict[str, Any], **more: Any) -> BuildOptions:
    return BuildOptions(Path("nowhere"), settings=settings, **more)


def facts(recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    found = sampling(resolve_options(recipe, options(settings)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "recipe", ["dit-fashion-s", "dico-fashion-s", "lit-fashion", "diffit-fashion", "terdit-fashion"]
)
@pytest.mark.parametrize("classes", [1, 4, 10, 11, 1000])
def test_names_of_classes_are_as_many_as_classes_or_none(recipe: str, classes: int) -> None:
    found = facts(recipe, {"num_classes": classes})
    assert found["class_names"] == (CLASSES if classes == len(CLASSES) else ())
    assert (found["classes"], found["null_label"]) == (classes, classes)


def test_a_bundle_of_other_classes_samples(tmp_path: Path) -> None:
    dexport.build("dit-fashion", tmp_path / "b", settings={**NARROW, "num_classes": 3}, parity=False)
    made = generate(Pipeline.open(tmp_path / "b"), tmp_path / "grid.png", steps=2)
    assert made.settings["labels"] == [0, 1, 2]


@pytest.mark.parametrize("recipe", ["dit-s-2", "dico-s", "lit-fashion", "terdit-fashion", "diffit-fashion"])
@pytest.mark.parametrize("dropout", [0.1, 0, -1])
def test_no_classes_are_refused(recipe: str, dropout: float) -> None:
    with pytest.raises(UsageError, match=r"leaves no value for the input y|leaves .* empty"):
        resolve_options(recipe, options({"num_classes": 0, "class_dropout_prob": dropout}))


def test_dimr_counts_its_null_label() -> None:
    assert facts("dimr-xl-2r", {"num_classes": 2})["classes"] == 1
    with pytest.raises(UsageError, match="leaves no value for the input y: from 0 to -1"):
        resolve_options("dimr-xl-2r", options({"num_classes": 1}))


@pytest.mark.parametrize(
    ("recipe", "settings", "field", "expected"),
    [
        ("dit-s-2", {}, "prediction", "epsilon, learned variance"),
        ("dit-s-2", {"learn_sigma": False}, "prediction", "epsilon"),
        ("dico-fashion-s", {"learn_sigma": False}, "prediction", "epsilon"),
        ("dimr-xl-2r", {}, "prediction", "epsilon"),
        ("diffit-image-32", {}, "prediction", "denoised image"),
        ("dit-s-2", {"class_dropout_prob": 0}, "null_label", None),
        ("dit-s-2", {"num_classes": 3}, "null_label", 3),
        ("diffit-256", {"input_size": 32, "depth": 1}, "guidance", "first three channels, power-cosine over time"),
        ("diffit-256", {"input_size": 64, "depth": 1}, "guidance", "first three channels"),
    ],
)
def test_facts_follow_the_configuration(recipe: str, settings: dict[str, Any], field: str, expected: Any) -> None:
    found = facts(recipe, settings)[field]
    assert (found["rule"] if field == "guidance" else found) == expected


@pytest.mark.parametrize(
    ("recipe", "settings", "more", "message"),
    [
        ("dit-s-2", {"in_channels": 3}, {}, "sd-vae-decoder takes latents of 4 channels"),
        ("dico-s", {"in_channels": 16}, {}, "sd-vae-decoder takes latents of 4 channels"),
        ("dimr-xl-2r", {"channels": 8}, {}, "sd-vae-decoder takes latents of 4 channels"),
        ("dit-fashion", {"in_channels": 3}, {}, "3 channels become no grey or RGB picture by 'pixel-shuffle-2'"),
        ("dico-fashion", {"in_channels": 8}, {}, "8 channels become no grey or RGB picture"),
        ("dit-fashion", {"in_channels": 12}, {}, "guidance is of 4 of 12 channels"),
        ("diffit-image-32", {"in_channels": 2}, {}, "2 channels become no grey or RGB picture by 'none'"),
        ("terdit-fashion", {"patch_size": 1}, {"latent": (3, 3)}, "6x6 is no sheet of 4x4 equal tiles"),
    ],
)
def test_what_the_decoder_would_not_take_is_refused(
    recipe: str, settings: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        resolve_options(recipe, options(settings, **more))
    assert refused.value.hint


def of_sampler(name: str) -> Recipe:
    recipe = find_recipe("dit-fashion")
    assert recipe.sampling is not None
    return replace(recipe, sampling=replace(recipe.sampling, sampler=name))


@pytest.mark.parametrize("sampler", ["edm", "flow"])
def test_a_variance_is_for_samplers_that_take_one(sampler: str) -> None:
    with pytest.raises(UsageError, match=f"{sampler!r} takes predictions of 4 channels"):
        resolve_options(of_sampler(sampler), options({}))
    resolve_options(of_sampler(sampler), options({"learn_sigma": False}))


def test_every_recipe_fits_its_own_decoder() -> None:
    for name in (
        "dit-xl-2-512",
        "dico-xl",
        "dimr-g-2r",
        "diffit-512",
        "diffit-image-64",
        "lit-fashion",
        "sd-vae-encoder",
    ):
        resolve_options(name, options({}))


def test_networks_are_resolved_whatever_decodes_them() -> None:
    """Only a bundle says what becomes of the output."""
    assert resolve(find_recipe("dit-s-2"), {"in_channels": 3}).signature.inputs[0].shape[1] == 3
