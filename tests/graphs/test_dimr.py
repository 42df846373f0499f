"""DiMR against the official code's golden, and what its configurations may and may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.graphs.axial_rope import AxialRoPE, centres
from dexport.graphs.dimr import DiMR, PixelShuffleUpsample
from dexport.graphs.time_dependent import NORMS, TimeDependentParameter, make_norm
from tests.golden import assert_golden, load_golden

GOLDEN = load_golden("dimr-2r")
TRANSFORMER = {
    "block_type": "TransformerBlock",
    "dim": 16,
    "hidden_dim": 24,
    "num_attention_heads": 2,
    "num_blocks": 2,
    "max_height": 4,
    "max_width": 4,
    "image_input_ratio": 1,
    "input_feature_ratio": 2,
    "final_kernel_size": 3,
}
CONVNEXT = {
    "block_type": "ConvNeXtBlock",
    "dim": 8,
    "hidden_dim": 12,
    "kernel_size": 3,
    "num_blocks": 1,
    "max_height": 8,
    "max_width": 8,
    "image_input_ratio": 1,
    "input_feature_ratio": 1,
    "final_kernel_size": 1,
}


def golden_model(**settings: Any) -> DiMR:
    model = DiMR(**GOLDEN.config, **settings).eval()
    model.load_state_dict(GOLDEN.weights)
    return model


@pytest.mark.golden
def test_alone_it_returns_the_last_branch() -> None:
    with torch.no_grad():
        out = golden_model()(GOLDEN.inputs["x"], GOLDEN.inputs["log_snr"], GOLDEN.inputs["y"])
    assert_golden(out, GOLDEN.outputs["forward"])


@pytest.mark.golden
@pytest.mark.parametrize(("power", "cfg_scale", "name"), [(-1, 1.4, "cfg_const"), (1.5, 2.8, "cfg_power")])
def test_both_guidance_rules_match_the_evaluation_script(power: float, cfg_scale: float, name: str) -> None:
    inputs = GOLDEN.inputs
    settings = {**GOLDEN.config, "cfg_scale_pow": power}
    guided = resolve(find_recipe("dimr-xl-2r"), settings, (16, 16), graphs=["guided"]).wrap(golden_model())
    with torch.no_grad():
        out = guided(inputs["x"], inputs["cfg_t"] / 1000 * 8 - 4, inputs["cfg_y"], torch.tensor(cfg_scale))
    assert_golden(out, GOLDEN.outputs[name])
    if power > 0:
        assert (float(inputs["cfg_pow"]), round(float(inputs["cfg_scale"]), 6)) == (power, cfg_scale)


def test_a_parameter_moves_with_time_from_one_value_to_the_other() -> None:
    parameter = TimeDependentParameter(2, 0.0)
    parameter.param0.data, parameter.param1.data = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.0])
    parameter.nodecay_weight.data = torch.tensor([49.0, -1.0])
    values = parameter(torch.tensor([-4.0, 4.0]))
    torch.testing.assert_close(values, torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("pe_type", ["APE", "Axial_RoPE"])
def test_samples_of_a_batch_do_not_meet(norm_type: str, pe_type: str) -> None:
    """Whatever the norm and the positions, and with a third branch in between."""
    torch.manual_seed(0)
    low = {**TRANSFORMER, "image_input_ratio": 2, "max_height": 2, "max_width": 2}
    classes = 5 if pe_type == "APE" else None
    config = {"norm_type": norm_type, "pe_type": pe_type, "num_classes": classes}
    model = DiMR(4, [low, TRANSFORMER, CONVNEXT], **config).eval()
    x, log_snr, y = torch.randn(3, 4, 8, 8), torch.tensor([-3.0, 0.5, 4.0]), torch.tensor([0, 4, 2])
    labels = y if classes else None
    with torch.no_grad():
        together = model.branches(x, log_snr, labels)
        alone = model.branches(x[1:2], log_snr[1:2], None if labels is None else labels[1:2])
    assert [tuple(out.shape) for out in together] == [(3, 4, 2, 2), (3, 4, 4, 4), (3, 4, 8, 8)]
    for whole, single in zip(together, alone, strict=True):
        assert whole.std() > 1e-3
        assert_golden(whole[1:2], single)


@pytest.mark.parametrize(
    ("norm_type", "size", "expected"),
    [("LN", 1e-3, 1 / 11**0.5), ("TDRMSN", 1e-8, 0.5), ("RMSN", 1e-8, 0.5), ("ADARMSN", 1e-3, 0.5**0.5)],
)
def test_values_as_small_as_the_epsilon_of_a_norm(norm_type: str, size: float, expected: float) -> None:
    """1e-5 under the root of LN, 1e-8 outside of that of the RMS norms, 1e-6 under that of the adaptive one."""
    norm = make_norm(norm_type, 4)
    for parameter in norm.parameters():
        parameter.data.fill_(0.0 if norm_type == "ADARMSN" else 1.0)
    if norm_type == "LN":
        norm.bias.param0.data.fill_(0.0)
        norm.bias.param1.data.fill_(0.0)
    x = size * torch.tensor([[[1.0, -1.0, 1.0, -1.0]]], dtype=torch.float64)
    out = norm.double()(x, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(out, expected / size * x, rtol=1e-6, atol=0)


def test_latents_may_be_smaller_than_the_positions_and_not_square() -> None:
    model = DiMR(4, [TRANSFORMER, CONVNEXT], num_classes=3).eval()
    assert model(torch.randn(2, 4, 4, 6), torch.zeros(2), torch.tensor([0, 2])).shape == (2, 4, 4, 6)


def test_a_cell_becomes_a_square_of_pixels_row_by_row() -> None:
    upsample = PixelShuffleUpsample(1, 1, 2)
    upsample.kernel.weight.data, upsample.kernel.bias.data = torch.zeros(4, 1), torch.arange(4.0)
    assert upsample(torch.zeros(1, 1, 2, 1))[0, :, :, 0].tolist() == [[0, 1, 0, 1], [2, 3, 2, 3]]


def test_axial_positions_are_cell_centres_of_the_longer_side() -> None:
    torch.testing.assert_close(centres(4, 1.0), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    rope = AxialRoPE(dim=4, n_heads=1)
    rope.freqs_h.data, rope.freqs_w.data = torch.zeros(1, 1), torch.zeros(1, 1)
    angles = rope.angles(1, 2)[0]
    torch.testing.assert_close(angles, torch.tensor([[0.0, -0.5], [0.0, 0.5]]))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage_configs": []}, "stage_configs"),
        ({"stage_configs": [{**TRANSFORMER, "block_type": "Mamba"}]}, "block_type"),
        ({"stage_configs": [{**TRANSFORMER, "num_attention_heads": 3}]}, "num_attention_heads"),
        ({"stage_configs": [{**CONVNEXT, "kernel_size": 0}]}, "kernel_size"),
        ({"stage_configs": [{**CONVNEXT, "kernel_size": 4}]}, "kernel_size"),
        ({"norm_type": "BN"}, "norm_type"),
        ({"pe_type": "RoPE"}, "pe_type"),
        ({"pe_type": "Axial_RoPE"}, "class token"),
        ({"cfg_scale_pow": 0.0}, "cfg_scale_pow"),
    ],
)
def test_impossible_configurations_name_the_argument(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DiMR(**{"channels": 4, "stage_configs": [TRANSFORMER], "num_classes": 3, **changes})
