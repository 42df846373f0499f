"""``dexport quantize``: the same build again, with other weights in its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import dexport
from dexport.bundle import Bundle, load_bundle
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.exporter.build import build
from dexport.exporter.options import Player
from dexport.exporter.rebuild import options_of, recorded_options
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import RandomSource
from dexport.validate.build import forward_parity
from tests.bundles import NARROW


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


OPTIONS: dict[str, Any] = {
    "settings": NARROW,
    "guidance": "fused",
    "precision": "fp16",
    "islands": ("blocks.0.mlp",),
    "opset": 24,
    "no_passes": ("share-halves", "share-constants"),
    "profile": "ci",
    "parity": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with guidance inside, half precision and an island, and the checkpoint that it was built from."""
    folder = tmp_path_factory.mktemp("requantise")
    variant = resolve(find_recipe("dit-fashion"), NARROW)
    source = RandomSource(variant.meta_module(), 5)
    save_file({name: source._read(name) for name in source.shapes}, folder / "weights.safetensors")
    dexport.build("dit-fashion", folder / "plain", checkpoint=str(folder / "weights.safetensors"), **OPTIONS)
    return folder


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with other facts of its network."""
    network = bundle.network
    networks = {**bundle.manifest["networks"], network.name: {**network.manifest, **changes}}
    return replace(bundle, manifest={**bundle.manifest, "networks": networks})


def test_everything_but_the_weights_stays(folder: Path, tmp_path: Path) -> None:
    done = invoke("quantize", folder / "plain", "-o", tmp_path / "out", "--quantize", "int8", "--no-parity", "--json")
    assert done.exit_code == 0, done.output
    old, new = load_bundle(folder / "plain"), load_bundle(tmp_path / "out")
    assert json.loads(done.stdout)["files"] == new.manifest["files"]
    assert old.program == new.program
    assert old.network.graphs == new.network.graphs
    before, after = old.network.manifest, new.network.manifest
    same = ("config", "latent", "weights", "opset", "no_passes", "batch", "profile", "recipe")
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert after["precision"]["name"] == "fp16"
    assert after["precision"]["islands"] == before["precision"]["islands"]
    schemes = after["precision"]["layers"]
    assert {path for path, scheme in schemes.items() if scheme == "int8"} == {
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
    }
    assert after["sizes"]["onnx"] < before["sizes"]["onnx"]
    checkpoint = str(folder / "weights.safetensors")
    dexport.build("dit-fashion", tmp_path / "built", checkpoint=checkpoint, int8="weight", **OPTIONS)
    built = load_bundle(tmp_path / "built")
    assert built.network.manifest["precision"] == after["precision"]
    assert built.manifest["files"] == new.manifest["files"]


def test_a_moved_checkpoint_is_found_and_another_one_refused(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder / "plain")
    origin = bundle.network.manifest["weights"]
    moved = changed(bundle, weights={**origin, "path": str(tmp_path / "gone.safetensors")})
    with pytest.raises(UsageError, match=r"gone.safetensors, which is not there") as caught:
        options_of(moved, tmp_path / "out", int8="weight")
    assert "--checkpoint" in caught.value.hint
    found, options = options_of(moved, tmp_path / "out", int8="weight", checkpoint=origin["path"])
    assert (found.name, options.checkpoint, options.int8) == ("dit-fashion", origin["path"], "weight")
    other = changed(bundle, weights={**origin, "sha256": "0" * 64})
    with pytest.raises(InputError, match=r"its sha256 differs"):
        options_of(other, tmp_path / "out", int8="weight")


def test_random_and_inherited_weights_come_again(folder: Path, plain: Path, tmp_path: Path) -> None:
    _, options = options_of(load_bundle(plain), tmp_path / "out", ternary=True)
    assert (options.checkpoint, options.seed, options.ternary) == (None, 0, True)
    bundle = load_bundle(folder / "plain")
    lit = {"name": "lit-fashion", "family": "LiT", "source": ""}
    origin = {**bundle.network.manifest["weights"], "kind": "inherited", "seed": 4}
    _, options = options_of(changed(bundle, recipe=lit, weights=origin), tmp_path / "out", int8="weight")
    assert (options.checkpoint, options.init_from, options.seed) == (None, origin["path"], 4)


def test_the_recipe_of_another_bundle_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe 'dit-fashion', and 'dit-s-2' was given") as caught:
        options_of(load_bundle(plain), tmp_path / "out", int8="weight", recipe=find_recipe("dit-s-2"))
    assert "--recipe" in caught.value.hint
    done = invoke(
        "quantize", plain, "-o", tmp_path / "out", "--quantize", "int8", "--recipe", "examples/my_backbone.py"
    )
    assert done.exit_code == 2
    assert "recipe 'dit-fashion'" in done.stderr


def test_an_engine_is_built_again(plain: Path, tmp_path: Path) -> None:
    engine = {"flavour": "tensorrt-rtx", "targets": ["sm89", "sm120"]}
    bundle = load_bundle(plain)
    graphs = {"model": {**bundle.network.entry(), "engine": engine}}
    _, options = options_of(changed(bundle, graphs=graphs), tmp_path / "out", int8="weight")
    assert (options.trt, options.engine, options.targets) == (True, "tensorrt-rtx", ("sm89", "sm120"))


def test_ternary_layers_stay_as_they_were_stored(tmp_path: Path) -> None:
    tiny = {"dim": 64, "n_layers": 1, "n_heads": 2, "multiple_of": 32}
    options = {"settings": tiny, "profile": "ci", "parity": False}
    packed = dexport.build("terdit-fashion", tmp_path / "packed", ternary_carrier="packed", **options).bundle
    _, chosen = options_of(packed, tmp_path / "out", precision_map={"final_layer": "int8"})
    assert (chosen.ternary, chosen.ternary_carrier) == (None, "packed")
    _, dense = options_of(changed(packed, ternary=None), tmp_path / "out", int8="weight")
    assert dense.ternary is False
    done = invoke("quantize", tmp_path / "packed", "--quantize", "int8", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "--quantize none,int8" in done.stderr
    done = invoke(*("quantize", tmp_path / "packed", "--quantize", "none,int8", "--no-parity", "-o", tmp_path / "out"))
    assert done.exit_code == 0, done.output
    stored = load_bundle(tmp_path / "out").network.manifest
    assert stored["ternary"] is None and set(stored["precision"]["layers"].values()) == {"float", "int8"}


def test_the_decoder_is_copied(tmp_path: Path) -> None:
    settings = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    dexport.build("sd-vae-decoder", tmp_path / "decoder", settings=settings, latent=(8, 8), parity=False)
    held = dexport.build(
        "dit-s-2",
        tmp_path / "held",
        settings=NARROW,
        latent=(8, 8),
        players={"decoder": (Player(str(tmp_path / "decoder")),)},
        profile="ci",
        parity=False,
    ).bundle
    recipe, options = options_of(held, tmp_path / "out", int8="weight", parity=False)
    assert options.players == {"decoder": (Player(str(tmp_path / "held")),)}
    bundle = build(recipe, options, forward_parity).bundle
    copied, files = bundle.networks["decoder"], load_bundle(tmp_path / "decoder").manifest["files"]
    assert copied.manifest == held.networks["decoder"].manifest
    assert {name: bundle.manifest["files"][f"{copied.folder}/{name}"] for name in files} == files
    assert "int8" in bundle.network.manifest["precision"]["layers"].values()


@pytest.mark.parametrize(
    ("changes", "choices", "message"),
    [
        ({}, {}, r"nothing says how to quantise"),
        ({"profile": "mine"}, {"int8": "weight"}, r"the profile 'mine', which is a file of your own"),
        ({"recipe": {"name": "dit-mine"}}, {"int8": "weight"}, r"no recipe named 'dit-mine'"),
    ],
)
def test_what_is_missing_is_told(
    plain: Path, tmp_path: Path, changes: dict[str, Any], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        options_of(changed(load_bundle(plain), **changes), tmp_path / "out", **choices)


def test_an_incomplete_manifest_is_bad_input(plain: Path, tmp_path: Path) -> None:
    bundle = load_bundle(plain)
    shorter = {name: value for name, value in bundle.network.manifest.items() if name != "opset"}
    incomplete = replace(bundle, manifest={**bundle.manifest, "networks": {bundle.network.name: shorter}})
    with pytest.raises(InputError, match=r"the manifest lacks what a build needs: 'opset'"):
        options_of(incomplete, tmp_path / "out", int8="weight")


def test_a_stitched_bundle_is_quantised_network_by_network(stitched: Path, tmp_path: Path) -> None:
    done = invoke("quantize", stitched, "--quantize", "int8", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "holds 2 networks of the role denoiser" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("program", [None, {"prediction": "velocity"}, {"kind": "average"}])
def test_a_system_that_is_more_than_its_recipe_is_not_built_as_that(
    folder: Path, tmp_path: Path, program: dict[str, Any] | None
) -> None:
    plain = load_bundle(folder / "plain")
    recorded_options(plain, tmp_path / "out")
    other = replace(plain, manifest={**plain.manifest, "program": program and {**(plain.program or {}), **program}})
    with pytest.raises((InputError, UsageError), match=r"another system than the recipe dit-fashion|average"):
        recorded_options(other, tmp_path / "out")
