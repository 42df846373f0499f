"""The trained checkpoints: they fit their recipes, say how they were made, and predict noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.fashion import RECIPES
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import load_into, open_weights

FOLDER = Path(__file__).parent.parent / "checkpoints"
NAMES = [recipe.name for recipe in RECIPES]
LARGEST = 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_record_says_how_it_was_trained(name: str) -> None:
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert record["recipe"] == name
    assert record["data"]["package"] == "dataset-fashion-mnist"
    assert {"steps", "batch", "seed", "minutes", "learning_rate", "torch"} <= record.keys()
    losses = [loss for _, loss in record["mse_by_step"]]
    assert losses[-1] < 0.06 < losses[0]
    assert (FOLDER / f"{name}.safetensors").stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_network_predicts_the_noise_in_a_noisy_image(name: str) -> None:
    recipe = find_recipe(name)
    variant = resolve(recipe)
    weights = open_weights(FOLDER / f"{name}.safetensors", variant.meta_module(), adapt=recipe.adapt)
    network = load_into(weights, variant.meta_module()).eval()
    torch.manual_seed(0)
    noise = torch.randn(4, 4, 16, 16)
    signal = 0.1  # an image of which little is left: black, as all corners and most of each picture are
    with torch.no_grad():
        predicted = network(noise - signal, torch.full((4,), 850.0), torch.arange(4))[:, :4]
    error = (predicted - noise).square().mean()
    assert error < 0.05
