"""The halves of the SD VAE against the official class's keys, and what their configurations may and may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dexport.graphs.sd_vae import VaeDecoder, VaeEncoder
from tests.golden import load_keys

TINY = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def test_log_variance_is_clamped() -> None:
    module = VaeEncoder(**TINY).eval()
    with torch.no_grad():
        module.quant_conv.weight.zero_()
        module.quant_conv.bias.copy_(torch.tensor([-99.0, 99, -99, 99] * 2))
        mean, logvar = module(torch.zeros(1, 3, 4, 4))
    assert mean.unique().tolist() == [-99, 99]
    assert logvar.unique().tolist() == [-30, 20]


def test_the_halves_together_have_exactly_the_official_keys_and_shapes() -> None:
    with torch.device("meta"):
        state = {**VaeEncoder().state_dict(), **VaeDecoder().state_dict()}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == load_keys("SD-VAE-f8-diffusers")


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        {**TINY, "block_out_channels": [8, 8, 16], "layers_per_block": 3, "latent_channels": 16},
        {**TINY, "block_out_channels": [12], "norm_num_groups": 3, "in_channels": 1, "out_channels": 2},
        {**TINY, "act_fn": "mish"},
    ],
)
def test_shapes_follow_the_configuration(config: dict[str, Any]) -> None:
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    channels = config.get("latent_channels", 4)
    image = torch.randn(2, config.get("in_channels", 3), 8 * factor, 4 * factor)
    mean, logvar = VaeEncoder(**config)(image)
    assert mean.shape == logvar.shape == (2, channels, 8, 4)
    assert VaeDecoder(**config)(mean).shape == (2, config.get("out_channels", 3), 8 * factor, 4 * factor)


@pytest.mark.parametrize("half", [VaeDecoder, VaeEncoder])
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "block types"),
    ],
)
def test_impossible_configurations_name_the_argument(half: type, setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        half(**{**TINY, **setting})
