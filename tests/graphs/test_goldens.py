"""The graphs against the official code: same weights, same inputs, same outputs."""

from __future__ import annotations

import pytest
import torch

from dexport.graphs.dico import DiCo
from dexport.graphs.dit import DiT
from dexport.graphs.guidance import FirstChannelsGuidance
from dexport.graphs.layers import sincos_table
from tests.golden import Golden, load_golden, load_keys

ATOL = 2e-5
CLASSES = {"dit-s": DiT, "dico-s": DiCo}


@pytest.fixture
def module(golden: Golden, golden_name: str) -> torch.nn.Module:
    module = CLASSES[golden_name](**golden.config).eval()
    module.load_state_dict(golden.weights)
    return module


def test_forward_matches_the_official_output(module: torch.nn.Module, golden: Golden) -> None:
    inputs = golden.inputs
    with torch.no_grad():
        out = module(inputs["x"], inputs["t"].float(), inputs["y"])
    torch.testing.assert_close(out, golden.outputs["forward"], atol=ATOL, rtol=0)


def test_guided_forward_is_the_conditional_half_of_forward_with_cfg(module: torch.nn.Module, golden: Golden) -> None:
    inputs = golden.inputs
    half = len(inputs["cfg_x"]) // 2
    guided = FirstChannelsGuidance(module, null_label=golden.config["num_classes"])
    with torch.no_grad():
        out = guided(
            inputs["cfg_x"][:half], inputs["cfg_t"][:half].float(), inputs["cfg_y"][:half], inputs["cfg_scale"]
        )
    torch.testing.assert_close(out, golden.outputs["forward_with_cfg"][:half], atol=ATOL, rtol=0)


def test_sincos_table_is_the_official_one() -> None:
    golden = load_golden("dit-s")
    side = golden.config["input_size"] // golden.config["patch_size"]
    table = sincos_table(golden.config["hidden_size"], side, side)
    torch.testing.assert_close(table, golden.outputs["pos_embed_sincos"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("module_class", "config", "keys"),
    [
        (DiT, {}, "DiT-XL-2-256"),
        (DiCo, {"hidden_size": 416, "depth": [9, 9, 10, 9, 9], "mlp_ratio": 2}, "DiCo-XL"),
    ],
)
def test_state_dict_has_exactly_the_official_keys_and_shapes(module_class, config, keys) -> None:
    with torch.device("meta"):
        state = module_class(**config).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == load_keys(keys)


def test_dico_takes_non_square_latents() -> None:
    model = DiCo(hidden_size=4, depth=[1, 1, 1, 1, 1], mlp_ratio=2, num_classes=3).eval()
    out = model(torch.randn(2, 4, 8, 20), torch.tensor([0.5, 999.0]), torch.tensor([0, 3]))
    assert out.shape == (2, 8, 8, 20)


def test_without_learned_sigma_or_dropout_the_shapes_follow() -> None:
    model = DiT(
        input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3, class_dropout_prob=0.0, learn_sigma=False
    )
    assert model.y_embedder.embedding_table.weight.shape == (3, 16)
    assert model(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.tensor([0, 2])).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("module_class", "config", "named"),
    [
        (DiT, {"input_size": 9}, "patch_size"),
        (DiT, {"hidden_size": 30, "num_heads": 4}, "num_heads"),
        (DiCo, {"depth": [1, 2]}, "five"),
        (DiCo, {"hidden_size": 3}, "even"),
    ],
)
def test_impossible_configurations_name_the_argument(module_class, config, named) -> None:
    with pytest.raises(ValueError, match=named):
        module_class(**config)
