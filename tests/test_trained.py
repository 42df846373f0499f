"""The trained checkpoints: they fit their recipes, say how they were made, and predict what they were trained for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.fashion import RECIPES
from dexport.exporter.recipes.fashion_masked import TOKENIZER
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import load_into, open_weights

FOLDER = Path(__file__).parent.parent / "checkpoints"
NAMES = [recipe.name for recipe in RECIPES]
LARGEST = 12_000_000


MASKED = {TOKENIZER: 0.005, "maskgit-r-fashion": 4.6, "mar-fashion": 0.09}
"""Last losses: mean squared error in [0, 1], nats of one id in 256 (5.5 at random), epsilon MSE."""


@pytest.mark.parametrize(("name", "loss"), [*((name, 0.06) for name in NAMES), *MASKED.items()])
def test_record_says_how_it_was_trained(name: str, loss: float) -> None:
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert record["recipe"] == name
    assert record["data"]["package"] == "dataset-fashion-mnist"
    assert {"steps", "batch", "seed", "minutes", "learning_rate", "torch"} <= record.keys()
    losses = [loss for _, loss in record["loss_by_step"]]
    assert losses[-1] < loss < losses[0]
    assert (FOLDER / f"{name}.safetensors").stat().st_size < LARGEST


def trained(name: str, checkpoint: str = "") -> torch.nn.Module:
    recipe = find_recipe(name)
    variant = resolve(recipe)
    path = FOLDER / f"{checkpoint or name}.safetensors"
    weights = open_weights(path, variant.meta_module(), adapt=recipe.adapt)
    return load_into(weights, variant.meta_module()).eval()


@pytest.mark.parametrize("name", NAMES)
def test_network_predicts_the_noise_in_a_noisy_image(name: str) -> None:
    network = trained(name)
    torch.manual_seed(0)
    noise = torch.randn(4, 4, 16, 16)
    signal = 0.1  # an image of which little is left: black, as all corners and most of each picture are
    with torch.no_grad():
        predicted = network(noise - signal, torch.full((4,), 850.0), torch.arange(4))[:, :4]
    error = (predicted - noise).square().mean()
    assert error < 0.05


def trouser() -> torch.Tensor:
    """Like one: two bright legs on black, (1, 1, 32, 32) in [0, 1]."""
    picture = torch.zeros(1, 1, 32, 32)
    picture[..., 4:28, 11:15] = picture[..., 4:28, 17:21] = picture[..., 4:10, 11:21] = 0.6
    return picture


@torch.no_grad()
def test_tokens_come_back_as_the_picture_and_are_likely() -> None:
    encoder, decoder = (trained(f"{TOKENIZER}-{half}", TOKENIZER) for half in ("encoder", "decoder"))
    ids = encoder(trouser())
    assert (decoder(ids) - trouser()).square().mean() < 0.01
    half = ids.clone()
    half[:, ::2] = 256  # the mask
    logits = trained("maskgit-r-fashion")(half, torch.tensor([[1]]))
    likely = torch.log_softmax(logits, -1).gather(2, ids.unsqueeze(2))[:, ::2].mean()
    assert likely > -4.6  # -5.5 at random


@torch.no_grad()
def test_mar_predicts_the_noise_of_a_token_from_its_neighbours() -> None:
    network = trained("mar-fashion")
    tokens = torch.nn.functional.pixel_unshuffle(trouser() * 2 - 1, 4).flatten(2).transpose(1, 2)
    mask = (torch.arange(64) % 2).float().unsqueeze(0)
    z = network(tokens, mask, torch.tensor([1]))[:, 1::2].flatten(0, 1)
    torch.manual_seed(0)
    noise, signal = torch.randn(32, 16), 0.1
    noisy = signal * tokens[:, 1::2].flatten(0, 1) + (1 - signal**2) ** 0.5 * noise
    predicted = network.diffloss.net(noisy, torch.full((32,), 935.0), z)[:, :16]
    assert (predicted - noise).square().mean() < 0.05
