"""LiT from a DiT checkpoint: exactly what agrees is taken, and reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import dexport
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.inherit import inherit_weights
from dexport.exporter.weights.source import RandomSource

SETTINGS = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 3, "input_size": 4}


def variant(name: str, **more: object) -> Variant:
    return resolve(find_recipe(name), {**SETTINGS, **more})


def write(name: str, path: Path, **more: object) -> dict[str, torch.Tensor]:
    source = RandomSource(variant(name, **more).meta_module(), seed=9)
    weights = {key: source.read(key, torch.float32) for key in source.shapes}
    save_file(weights, path)
    return weights


def open_for_lit(path: Path):
    lit = variant("lit-s-2")
    return inherit_weights(str(path), lit.meta_module(), lit.recipe.not_inherited, seed=1)


def test_everything_but_the_attention_is_inherited(tmp_path: Path) -> None:
    dit = write("dit-s-2", tmp_path / "dit.safetensors")
    source = open_for_lit(tmp_path / "dit.safetensors")
    origin = source.origin
    assert all(".attn." not in name for name in origin.inherited)
    assert all(".attn." in name for name in (*origin.fresh, *origin.dropped))
    assert set(origin.inherited) | set(origin.dropped) == set(dit)
    assert set(origin.inherited) | set(origin.fresh) == set(source.shapes)
    for name in origin.inherited:
        assert torch.equal(source.read(name, torch.float32), dit[name])
    for name in origin.fresh:
        assert source.read(name, torch.float32).shape == source.shapes[name]
    assert origin.random
    assert "RANDOM" in str(origin)


@pytest.mark.parametrize("more", [{"hidden_size": 48}, {"depth": 3}, {"depth": 1}])
def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path, more: dict[str, int]) -> None:
    write("dit-s-2", tmp_path / "dit.safetensors", **more)
    with pytest.raises(InputError, match="cannot be inherited") as caught:
        open_for_lit(tmp_path / "dit.safetensors")
    assert caught.value.hint


def test_only_recipes_that_allow_it_inherit(tmp_path: Path) -> None:
    write("dit-s-2", tmp_path / "dit.safetensors")
    dit = variant("dit-s-2")
    with pytest.raises(UsageError, match="cannot start from"):
        inherit_weights(str(tmp_path / "dit.safetensors"), dit.meta_module(), dit.recipe.not_inherited, seed=0)


def test_the_manifest_lists_what_was_inherited(tmp_path: Path) -> None:
    write("dit-s-2", tmp_path / "dit.safetensors")
    result = dexport.build("lit-s-2", tmp_path / "out", settings=SETTINGS, init_from=str(tmp_path / "dit.safetensors"))
    assert result.verdict.passed
    weights = load_bundle(tmp_path / "out").network.manifest["weights"]
    assert weights["kind"] == "inherited"
    assert weights["random"] is True
    assert "blocks.0.mlp.fc1.weight" in weights["inherited"]
    assert "blocks.0.attn.dwc.weight" in weights["fresh"]
    assert "blocks.0.attn.qkv.weight" in weights["dropped"]


def test_checkpoint_and_init_from_exclude_each_other(tmp_path: Path) -> None:
    arguments = ["build", "lit-s-2", "--checkpoint", "a.pt", "--init-from", "b.pt", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "exclude each other" in result.output
