"""``--precision auto``: float16, but for what it cannot hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import dexport
from dexport.bundle import hash_files, load_bundle
from dexport.cli import main
from dexport.errors import InputError
from dexport.exporter import ranges
from dexport.exporter.quantize.calibrate import Calibration
from dexport.exporter.ranges import LARGEST, Range, Ranges, find_ranges
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from tests.validate.planted import loud_checkpoint

SETTINGS = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "input_size": 8}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SETTINGS", Calibration(images=4, steps=2))


@pytest.fixture
def variant() -> Variant:
    return resolve(find_recipe("dit-s-2"), SETTINGS)


def measured(variant: Variant, path: Path, **changes: float) -> Ranges:
    """Ranges of seeded weights, some of them multiplied."""
    source = open_weights(None, variant.meta_module(), seed=0)
    state = {name: source.read(name, torch.float32) * changes.get(name, 1.0) for name in source.shapes}
    save_file(state, path / "w.safetensors")
    return find_ranges(variant, open_weights(path / "w.safetensors", variant.meta_module()), lambda *_: None)


def test_an_overflow_fails_in_fp16_and_passes_in_auto(tmp_path: Path) -> None:
    checkpoint = loud_checkpoint(tmp_path / "loud.safetensors", SETTINGS)
    options = {"settings": SETTINGS, "checkpoint": checkpoint, "profile": "ci"}
    assert not dexport.build("dit-s-2", tmp_path / "fp16", precision="fp16", **options).verdict.passed
    result = CliRunner().invoke(
        main,
        [
            *("build", "dit-s-2", "--precision", "auto", "--checkpoint", checkpoint, "--profile", "ci"),
            *(f"--set={name}={value}" for name, value in SETTINGS.items()),
            *("-o", str(tmp_path / "auto")),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert "kept in float32" in result.output
    bundle = load_bundle(tmp_path / "auto")
    precision, nodes = bundle.network.manifest["precision"], bundle.network.entry()["nodes"]
    assert precision["name"] == "fp16"
    assert {"blocks.1.mlp.fc1", "blocks.1.mlp.act", "blocks.1.mlp.fc2"} == set(precision["ranges"]["kept"])
    assert precision["ranges"]["kept"]["blocks.1.mlp.fc1"]["largest"] > 1e5
    assert nodes["blocks.1.mlp.fc1/MatMul"] == "float32"
    assert nodes["blocks.0.mlp.fc1/MatMul"] == "float16"
    report = json.loads((bundle.path / "reports" / "ranges.json").read_text())
    assert {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"} <= set(report["modules"])
    assert report["modules"]["blocks.0.mlp.fc1"]["reasons"] == {}


def test_auto_is_fp16_where_everything_fits(tmp_path: Path) -> None:
    options = {"settings": {**SETTINGS, "depth": 1}, "profile": "ci", "parity": False}
    for precision in ("auto", "fp16"):
        dexport.build("dit-s-2", tmp_path / precision, precision=precision, **options)
    auto, fp16 = (hash_files(tmp_path / name) for name in ("auto", "fp16"))
    assert {name: auto[name] for name in fp16} == fp16
    assert load_bundle(tmp_path / "auto").network.manifest["precision"]["ranges"]["kept"] == {}


def test_values_below_the_normal_range(variant: Variant, tmp_path: Path) -> None:
    found = measured(variant, tmp_path, **{f"blocks.0.adaLN_modulation.1.{name}": 1e-7 for name in ("weight", "bias")})
    assert found.islands(variant.recipe.islands) == ("blocks.0.adaLN_modulation.1",)
    seen = found.modules["blocks.0.adaLN_modulation.1"]
    assert seen.subnormal == 1 and seen.rounding > 1e-2
    assert any("float16 is off by" in reason for reason in seen.reasons)


def test_readers_of_large_values_stay_in_float32_too(variant: Variant, tmp_path: Path) -> None:
    found = measured(variant, tmp_path, **{"x_embedder.proj.weight": 1e6})
    assert any(" reads" in reason for reason in found.modules["blocks.0.norm1"].reasons)
    assert {"", "x_embedder.proj", "blocks.0"} <= set(found.islands(variant.recipe.islands))


def test_a_network_without_a_trajectory_is_watched_on_examples(tmp_path: Path) -> None:
    settings = {"block_out_channels": [32, 32], "layers_per_block": 1}
    vae = resolve(find_recipe("sd-vae-decoder"), settings, (4, 4))
    found = measured(vae, tmp_path, **{"decoder.conv_in.weight": 1e6})
    assert found.inputs == "2 example rows"
    assert "decoder.conv_in" in found.islands(vae.recipe.islands)


def test_what_is_no_number_names_its_module() -> None:
    network = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    network[0].bias.fill_(float("nan"))
    watch = ranges._Watch()
    with pytest.raises(InputError, match=r"^0: \w+ is NaN in float32"), watch.over(network, {}), torch.inference_mode():
        network(torch.zeros(1, 2))


def test_masks_are_no_overflow() -> None:
    seen = Range()
    assert not seen.observe(torch.tensor([-float("inf"), 3.0]), "masked_fill", LARGEST, small=True)
    assert seen.largest == 3 and not seen.reasons


class Masking(nn.Module):
    """Multiplies in place by a number, and hides one column."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.mul_(self.factor)
        hidden = torch.tensor([True, False])
        return (torch.zeros(2).masked_fill(hidden, -float("inf")) + x).softmax(-1) * y


@pytest.mark.parametrize(("factor", "reasons"), [(2.0, {}), (1e6, {"mul_ reaches": 2e6, "mul reads": 2e6})])
def test_what_is_computed_in_place_is_seen_and_masks_are_not(factor: float, reasons: dict[str, float]) -> None:
    watch = ranges._Watch()
    with watch.over(Masking(factor), {}), torch.inference_mode():
        Masking(factor)(torch.ones(1, 2))
    assert {name: watch.of("").reasons.get(name) for name in reasons} == reasons
    assert all(math.isfinite(figure) for figure in watch.of("").reasons.values())
    assert bool(watch.of("").reasons) == bool(reasons)


def test_islands_are_not_repeated() -> None:
    loud = {"reasons": {"linear reaches": 1e5}}
    modules = {path: Range(**loud) for path in ("t_embedder.mlp.0", "blocks.1", "blocks.1.mlp.fc1", "blocks.2.mlp")}
    assert Ranges("", modules).islands(Islands(modules=("t_embedder",))) == ("blocks.1", "blocks.2.mlp")


def test_two_precisions_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["build", "dit-s-2", "--bf16", "--precision", "auto", "-o", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "--bf16 and --precision auto exclude each other" in result.stderr
