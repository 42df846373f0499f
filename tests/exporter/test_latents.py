"""Configurations that change what is made of a denoiser's output: the facts follow, or the build is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dexport
from dexport.contract import GuidanceRule
from dexport.errors import InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.fashion import CLASSES
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.trajectory import program_of
from dexport.exporter.variant import resolve
from dexport.runtime.generate import SampleRequest, generate
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.diffusion import Diffusion
from tests.exporter.resolving import resolved

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2}
BRANCH = find_recipe("dimr-xl-2r").config["stage_configs"][0]


def facts(recipe: str, settings: dict[str, Any]) -> Diffusion:
    program = program_of(resolved(recipe, settings=settings))
    assert isinstance(program, Diffusion)
    return program


@pytest.mark.parametrize(
    "recipe", ["dit-fashion-s", "dico-fashion-s", "lit-fashion", "diffit-fashion", "terdit-fashion"]
)
@pytest.mark.parametrize("classes", [1, 4, 10, 11, 1000])
def test_names_of_classes_are_as_many_as_classes_or_none(recipe: str, classes: int) -> None:
    found = facts(recipe, {"num_classes": classes}).condition
    assert found.names == (CLASSES if classes == len(CLASSES) else ())
    assert (found.classes, found.null) == (classes, classes)


def test_a_bundle_of_other_classes_samples(tmp_path: Path) -> None:
    dexport.build("dit-fashion", tmp_path / "b", settings={**NARROW, "num_classes": 3}, parity=False)
    made = generate(OpenProgram.open(tmp_path / "b"), tmp_path / "grid.png", SampleRequest(settings={"steps": 2}))
    assert made.settings["labels"] == [0, 1, 2]


@pytest.mark.parametrize("recipe", ["dit-s-2", "dico-s", "lit-fashion", "terdit-fashion", "diffit-fashion"])
@pytest.mark.parametrize("dropout", [0.1, 0, -1])
def test_no_classes_are_refused(recipe: str, dropout: float) -> None:
    with pytest.raises(UsageError, match=r"leaves no value for the input y|leaves .* empty"):
        resolved(recipe, settings={"num_classes": 0, "class_dropout_prob": dropout})


def test_dimr_counts_its_null_label() -> None:
    assert facts("dimr-xl-2r", {"num_classes": 2}).condition.classes == 1
    with pytest.raises(UsageError, match="leaves no value for the input y: from 0 to -1"):
        resolved("dimr-xl-2r", settings={"num_classes": 1})


@pytest.mark.parametrize(
    ("recipe", "settings", "field", "expected"),
    [
        ("dit-s-2", {}, "prediction", "epsilon, learned variance"),
        ("dit-s-2", {"learn_sigma": False}, "prediction", "epsilon"),
        ("dico-fashion-s", {"learn_sigma": False}, "prediction", "epsilon"),
        ("dimr-xl-2r", {}, "prediction", "epsilon"),
        ("diffit-image-32", {}, "prediction", "denoised image"),
        ("dit-s-2", {"class_dropout_prob": 0}, "null", None),
        ("dit-s-2", {"num_classes": 3}, "null", 3),
        ("diffit-256", {"input_size": 32, "depth": 1}, "guidance", GuidanceRule(3, 4.0)),
        ("diffit-256", {"input_size": 64, "depth": 1}, "guidance", GuidanceRule(3)),
    ],
)
def test_facts_follow_the_configuration(recipe: str, settings: dict[str, Any], field: str, expected: Any) -> None:
    found = facts(recipe, settings)
    assert getattr(found.condition if field == "null" else found, field) == expected


@pytest.mark.parametrize(
    ("recipe", "settings", "more", "message"),
    [
        ("dit-s-2", {"in_channels": 3}, {}, "the decoder takes latents"),
        ("dico-s", {"in_channels": 16}, {}, "the decoder takes latents"),
        ("dimr-xl-2r", {"channels": 8}, {}, "the decoder takes latents"),
        ("dit-fashion", {"in_channels": 3}, {}, "3 channels become no grey or RGB picture by a pixel shuffle of 2"),
        ("dico-fashion", {"in_channels": 8}, {}, "8 channels become no grey or RGB picture"),
        ("dit-fashion", {"in_channels": 12}, {}, "guidance is of 4 of 12 channels"),
        ("diffit-image-32", {"in_channels": 2}, {}, "2 channels become no grey or RGB picture by a pixel shuffle of 1"),
        ("terdit-fashion", {"patch_size": 1}, {"latent": (3, 3)}, "6x6 is no sheet of 4x4 equal tiles"),
    ],
)
def test_what_the_decoder_would_not_take_is_refused(
    recipe: str, settings: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        resolved(recipe, settings=settings, **more)
    assert refused.value.hint


def of_sampler(name: str) -> Recipe:
    recipe = find_recipe("dit-fashion")
    assert recipe.sampling is not None
    return replace(recipe, sampling=replace(recipe.sampling, sampler=name))


@pytest.mark.parametrize("sampler", ["edm", "flow"])
def test_a_variance_is_for_samplers_that_take_one(sampler: str) -> None:
    with pytest.raises(InputError, match=f"{sampler} takes predictions of 4 channels"):
        resolved(of_sampler(sampler))
    with pytest.raises(InputError, match=f"{sampler} takes predictions of 4 channels"):
        resolved(of_sampler(sampler), settings={"depth": 2})
    described = replace(of_sampler(sampler), config={**of_sampler(sampler).config, "learn_sigma": False})
    with pytest.raises(UsageError, match=f"{sampler} takes predictions of 4 channels"):
        resolved(described, settings={"learn_sigma": True})
    resolved(of_sampler(sampler), settings={"learn_sigma": False})


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
        resolved(name)


def test_networks_are_resolved_whatever_decodes_them() -> None:
    """Only a bundle says what becomes of the output."""
    assert resolve(find_recipe("dit-s-2"), {"in_channels": 3}).signature.inputs[0].shape[1] == 3
