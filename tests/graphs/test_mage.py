"""MAGE against the official code's golden, what a light pass is, and what configurations may and may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.mage import TOKENIZER, UNUSED
from dexport.exporter.variant import resolve
from dexport.graphs.mage import FAKE_CLASS, Full, Light, Mage
from tests.golden import assert_golden, load_golden, load_keys

GOLDEN = load_golden("mage-transformer")
EAGER = 2e-5
SMALL = {
    "img_size": 64,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
    "n_embed": 20,
}
"""16 places, and a decoder of another width."""


def own_weights() -> dict[str, torch.Tensor]:
    others = UNUSED | TOKENIZER
    return {name: value for name, value in GOLDEN.weights.items() if name.partition(".")[0] not in others}


def golden_model() -> Mage:
    model = Mage(**GOLDEN.config).eval()
    model.load_state_dict(own_weights())
    return model


def small_model(**settings: Any) -> Mage:
    torch.manual_seed(0)
    model = Mage(**{**SMALL, **settings}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.golden
def test_it_generates_as_the_official_code() -> None:
    ids, model = GOLDEN.inputs["token_ids"], golden_model()
    assert torch.equal(ids == model.mask_id, GOLDEN.inputs["token_all_mask"].bool())
    assert (model.mask_id, model.fake_class) == tuple(
        int(GOLDEN.metadata[name]) for name in ("mask_token_label", "fake_class_label")
    )
    with torch.no_grad():
        assert_golden(model(ids), GOLDEN.outputs["logits"], EAGER)
        assert_golden(model.encode(ids), GOLDEN.outputs["encoder_out"], EAGER)


def test_keys_are_those_of_official_files_but_for_what_does_not_generate() -> None:
    state = resolve(find_recipe("mage-b")).outline.state_dict()
    official = load_keys("MAGE-ViT-B")
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    others = {name for name in official if name.partition(".")[0] in UNUSED | TOKENIZER}
    assert found == {name: shape for name, shape in official.items() if name not in others}
    assert sorted(set(GOLDEN.weights) - set(own_weights())) == sorted(
        name for name in others if not name.startswith("vqgan.")
    )


@pytest.mark.parametrize(("name", "parameters"), [("mage-b", 144_896_745), ("mage-l", 407_788_521)])
def test_sizes(name: str, parameters: int) -> None:
    assert sum(each.numel() for each in resolve(find_recipe(name)).outline.parameters()) == parameters


def test_a_light_pass_over_every_place_is_a_full_pass() -> None:
    model, ids = small_model(), torch.randint(0, 20, (3, 17))
    ids[:, 0] = 20 + FAKE_CLASS
    ids[:, [2, 5, 11]] = model.mask_id
    places = torch.stack([torch.randperm(16) for _ in range(3)])
    with torch.no_grad():
        logits, *kept = Full(model)(ids)
        local = torch.cat([ids[:, :1], ids[:, 1:].gather(1, places)], dim=1)
        light = Light(model)(local, places, *[torch.full_like(each, 100.0) for each in kept])
    expected = logits[:, 1:].gather(1, places.unsqueeze(2).expand(-1, -1, logits.shape[2]))
    assert_golden(light[:, :1], logits[:, :1])
    assert_golden(light[:, 1:], expected)


def test_a_light_pass_with_nothing_new_changes_nothing() -> None:
    """Its group is computed again beside what was kept of the others, and empty places of it are seen by nobody."""
    model, ids = small_model(), torch.randint(0, 20, (2, 17))
    ids[:, 0], ids[:, 6:] = 20 + FAKE_CLASS, model.mask_id
    places = torch.tensor([[7, 3, 12, 0], [1, 15, 9, 2]])
    with torch.no_grad():
        logits, *kept = Full(model)(ids)
        local = torch.cat([ids[:, :1], ids[:, 1:].gather(1, places)], dim=1)
        light = Light(model)(local, places, *kept)
        empty = torch.full((2, 3), -1)
        padded = Light(model)(torch.cat([local, empty + 8], 1), torch.cat([places, empty], 1), *kept)
    assert_golden(light[:, 1:], logits[:, 1:].gather(1, places.unsqueeze(2).expand(-1, -1, logits.shape[2])))
    assert_golden(padded[:, :5], light)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"img_size": 70}, "patch_size"),
        ({"img_size": 512}, "positions for 256"),
        ({"num_heads": 5}, "embed_dim"),
        ({"decoder_num_heads": 5}, "decoder_embed_dim"),
        ({"depth": 0}, "depth"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_impossible_configurations_name_the_argument(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Mage(**{**SMALL, **changes})
