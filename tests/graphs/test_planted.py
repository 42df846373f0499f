"""The tolerances of the goldens: below them lies the rounding of any processor, above them every fault that is made."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dexport.graphs.layers import TimestepEmbedder
from tests.golden import TOLERANCE, TOLERANCE_FLOAT64, load_golden, relative_error
from tests.graphs.official import NETWORKS, in_float64, official_network, official_pairs
from tests.graphs.planted import Plant, other_gelu, other_order_of_chunks, ten_times_the_epsilon

MARGIN = 3
OF_PROCESSORS = 2
"""The margin of rounding that differs here on top of what this processor rounds otherwise than the official run's."""


def worst(name: str, module: nn.Module) -> float:
    return max(relative_error(got, wanted) for got, wanted in official_pairs(name, module))


WITH_GELU = ("dit-s", "dico-s", "diffit-latent", "dimr-2r", "vitok-v1-image", "vitok-v1-video", "halton-text")
WITH_CHUNKS = (
    *("dit-s", "dico-s", "terdit-packed", "terdit-master", "sdvae-encoder", "vitok-v1-image", "vitok-v2-image"),
    *("halton-transformer", "mage-transformer", "recap-maskgit-step"),
)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        *((other_gelu, name) for name in WITH_GELU),
        *((other_order_of_chunks, name) for name in (*WITH_CHUNKS, "mar-vae-encoder")),
        *((ten_times_the_epsilon, name) for name in ("terdit-packed", "terdit-master", "vitok-v1-image")),
    ],
)
def test_a_fault_is_far_above_the_tolerance(plant: Plant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = official_network(name)
    plant(module, monkeypatch)
    assert worst(name, module) > MARGIN * TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_another_epsilon_is_above_the_tolerance_of_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = in_float64(official_network(name))
    ten_times_the_epsilon(module, monkeypatch)
    assert worst(name, module) > 1.5 * TOLERANCE_FLOAT64


@pytest.mark.parametrize("towards", [0.0, 2.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_another_processor_stays_below_the_tolerance(name: str, towards: float) -> None:
    """Its exp rounds one frequency in ten the other way."""
    module = official_network(name)
    for part in module.modules():
        if isinstance(part, TimestepEmbedder):
            part.freqs[1::10] = torch.nextafter(part.freqs[1::10], torch.tensor(towards))
    assert OF_PROCESSORS * worst(name, module) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recorded_rounding_of_the_official_code_stays_below_the_tolerance(name: str) -> None:
    golden = load_golden(name)
    for output, largest in json.loads(golden.metadata.get("wobble_maxabs", "{}")).items():
        assert MARGIN * largest < TOLERANCE * golden.outputs[output].abs().max(), output
