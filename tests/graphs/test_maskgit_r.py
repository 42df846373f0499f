"""MaskGIT-r's two passes against the official code's golden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.graphs.maskgit_r import Full, Light, UViT
from tests.golden import assert_golden, load_golden, load_keys

GOLDEN = load_golden("recap-maskgit-step")
EAGER = 2e-5
SMALL = {"img_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "codebook_size": 10, "num_classes": 4}


def golden_model() -> UViT:
    model = UViT(**GOLDEN.config).eval()
    model.load_state_dict(GOLDEN.weights)
    return model


@pytest.mark.golden
@pytest.mark.parametrize("empty", [0, 6])
def test_both_passes_are_the_official_ones(empty: int) -> None:
    """However many places of the group are empty."""
    model, given, wanted = golden_model(), GOLDEN.inputs, GOLDEN.outputs
    with torch.no_grad():
        logits, *kept = Full(model)(given["ids"], given["labels"])
        local, places = given["local_ids"], given["group_positions"]
        light = Light(model)(F.pad(local, (0, empty)), F.pad(places, (0, empty), value=-1), given["labels"], *kept)
        assert torch.equal(model(given["ids"], given["labels"]), logits)
    assert_golden(logits, wanted["full_logits"], EAGER)
    assert_golden(kept[0], wanted["k_layer0"], EAGER)
    assert_golden(kept[-1], wanted["v_last"], EAGER)
    assert_golden(light[:, : places.shape[1]], wanted["light_logits"], EAGER)
    outside = torch.cat([places, given["cached_positions"]], dim=1).sort(dim=1).values
    assert torch.equal(outside, torch.arange(64).expand(2, -1))  # what is kept is all that is outside of the group


def test_keys_are_the_official_ones() -> None:
    state = resolve(find_recipe("maskgit-r-256")).outline.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == load_keys("MaskGIT-r-UViT")
    assert sum(tensor.numel() for tensor in state.values()) == 193_655_297


@pytest.mark.parametrize("changes", [{"skip": False}, {"qkv_bias": True, "qk_scale": 0.5}, {"depth": 0}])
def test_other_configurations_and_rows_of_a_batch_do_not_meet(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = UViT(**{**SMALL, **changes}).eval()
    ids, labels = torch.randint(0, 11, (3, 16)), torch.tensor([[0], [3], [1]])
    places = torch.tensor([[1, 4, -1], [0, 2, 3], [15, -1, -1]])
    with torch.no_grad():
        logits, *kept = Full(model)(ids, labels)
        assert len(kept) == 2 * (2 * (model_depth(changes) // 2) + 1)
        light = Light(model)(ids[:, :3], places, labels, *kept)
        alone = Light(model)(ids[1:2, :3], places[1:2], labels[1:2], *(each[1:2] for each in kept))
    assert logits.shape == (3, 16, 10) and light.shape == (3, 3, 10)
    assert_golden(light[1:2], alone)


def model_depth(changes: dict[str, Any]) -> int:
    return changes.get("depth", SMALL["depth"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"num_heads": 3}, "embed_dim"), ({"img_size": 0}, "img_size"), ({"depth": -2}, "depth")],
)
def test_impossible_configurations_name_the_argument(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        UViT(**{**SMALL, **changes})
