"""A decoder inside the bundle of its denoiser, from the build to the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dexport
from dexport.bundle import load_bundle
from dexport.errors import InputError, UsageError
from dexport.exporter import recipes
from dexport.exporter.build import BuildResult
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.runtime.draws import Draws
from dexport.runtime.generate import SampleRequest, generate
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Request

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 4}


@pytest.fixture(autouse=True)
def _narrow_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    narrow = replace(find_recipe("sd-vae-decoder"), config=config)
    others = [recipe for recipe in recipes.BUILT_IN if recipe.name != narrow.name]
    monkeypatch.setattr(recipes, "BUILT_IN", (*others, narrow))


def build(output: Path, **options: object) -> BuildResult:
    options = {"settings": NARROW, "latent": (8, 8), "profile": "ci", "with_decoder": True, **options}
    return dexport.build("dit-s-2", output, **options)


def test_a_bundle_with_its_decoder_makes_pictures(tmp_path: Path) -> None:
    result = build(tmp_path / "out", precision="fp16")
    assert result.bundle.manifest["status"] == "passed"
    assert set(result.verdicts) == {"denoiser", "decoder"}
    decoder = load_bundle(tmp_path / "out").networks["decoder"]
    assert decoder.manifest["status"] == "passed"
    assert decoder.manifest["precision"]["name"] == "fp16"
    assert decoder.entry()["outputs"][0]["shape"] == ["B", 3, 64, 64]
    generate(OpenProgram.open(tmp_path / "out"), tmp_path / "grid.png", SampleRequest((1, 2), settings={"steps": 2}))
    assert Image.open(tmp_path / "grid-images" / "00000.png").size == (64, 64)


def pictures(folder: Path) -> np.ndarray:
    """What a denoiser and a decoder in bundles of their own make."""
    program = OpenProgram.open(folder / "denoiser", players={"decoder": folder / "decoder"}).with_settings(steps=2)
    return program.results(Request(1, (1,)), Draws(0, images=[0]))[PICTURES]


def test_a_decoder_may_lie_elsewhere(tmp_path: Path) -> None:
    build(tmp_path / "denoiser", with_decoder=False, parity=False)
    dexport.build("sd-vae-decoder", tmp_path / "decoder", latent=(8, 8), parity=False)
    assert pictures(tmp_path).shape == (1, 64, 64, 3)


def test_latents_larger_than_the_decoder_are_decoded_in_tiles(tmp_path: Path) -> None:
    build(tmp_path / "denoiser", with_decoder=False, parity=False, latent=(12, 12))
    dexport.build("sd-vae-decoder", tmp_path / "decoder", latent=(8, 8), parity=False)
    assert pictures(tmp_path).shape == (1, 96, 96, 3)


def test_a_bad_decoder_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"bad")
    with pytest.raises(InputError, match=r"vae\.safetensors"):
        build(tmp_path / "out", parity=False, decoder_checkpoint=str(tmp_path / "vae.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["vae.safetensors"]


def decoder_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A decoder's checkpoint in which something is wrong."""
    network = find_recipe("sd-vae-decoder")
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in resolve(network).outline.state_dict().items()}
    change(tensors)
    save_file(tensors, path)
    return path


BAD: dict[str, Callable[[Path], object]] = {
    "no such file": lambda _: None,
    "no checkpoint": lambda path: path.write_bytes(b"bad"),
    "cut": lambda path: path.write_bytes(decoder_weights(path, lambda _: None).read_bytes()[:-100]),
    "a missing tensor": lambda path: decoder_weights(path, lambda tensors: tensors.popitem()),
    "a foreign tensor": lambda path: decoder_weights(path, lambda tensors: tensors.update(x=torch.zeros(1))),
    "another shape": lambda path: decoder_weights(
        path, lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3)})
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stitched", [False, True])
def test_a_bad_decoder_checkpoint_is_found_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stitched: bool
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("the denoiser was built")

    monkeypatch.setattr("dexport.exporter.network_build.export_onnx", work)
    BAD[name](tmp_path / "vae.safetensors")
    before = sorted(tmp_path.iterdir())
    options = {"decoder_checkpoint": str(tmp_path / "vae.safetensors"), "parity": False, "cache": False}
    with pytest.raises((InputError, UsageError), match=r"vae\.safetensors"):
        if stitched:
            wider = {"settings": NARROW, "latent": (8, 8), "profile": "ci", "with_decoder": True}
            dexport.build(None, tmp_path / "out", stitch="dit-s-2:0.4,dit-b-2:0.6", **wider, **options)
        else:
            build(tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_latents_that_the_decoder_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the decoder takes latents"):
        build(tmp_path / "out", settings={**NARROW, "in_channels": 3})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("sd-vae-encoder", {"with_decoder": True}, "has no program, and so no role decoder"),
        (
            "dit-fashion",
            {"with_decoder": True, "decoder_checkpoint": "vae.pt"},
            "which has no weights",
        ),
        ("dit-s-2", {"decoder_checkpoint": "vae.pt"}, "nothing plays the role decoder"),
    ],
)
def test_decoders_that_make_no_sense(tmp_path: Path, recipe: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dexport.build(recipe, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_without_weights_needs_no_network(tmp_path: Path) -> None:
    settings = {"hidden_size": 16, "depth": 1, "num_heads": 2}
    result = dexport.build("dit-fashion", tmp_path / "out", settings=settings, with_decoder=True, parity=False)
    assert list(result.bundle.networks) == ["denoiser"]
