"""ViTok from the file to ONNX Runtime: official outputs in halves, and as the decoder of a denoiser."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import dexport
from dexport.bundle import load_bundle
from dexport.errors import InputError, UsageError
from dexport.exporter import recipes
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.runtime.decode import VaeDecoder
from dexport.runtime.generate import SampleRequest, generate
from dexport.runtime.opened import OpenProgram
from tests.golden import Golden, assert_golden, load_golden

ENGINE = {"trt": True, "engine": "tensorrt-rtx"} if find_spec("tensorrt_rtx") else {}
V1, V2 = "vitok-v1-s-b-1x16", "vitok-v2-350m-f16x16"


def build(recipe: str, golden: Golden, path: Path, latent: tuple[int, int], **options: Any) -> Path:
    """A half at the golden's size, from a file of both halves."""
    save_file(golden.weights, path.with_suffix(".safetensors"))
    settings = {**golden.config, **options.pop("settings", {})}
    checkpoint = str(path.with_suffix(".safetensors"))
    dexport.build(recipe, path, settings=settings, latent=latent, checkpoint=checkpoint, profile="ci", **options)
    assert load_bundle(path).manifest["status"] == "passed"
    return path


def assert_engine(path: Path) -> None:
    """It was built, where TensorRT-RTX is installed, with the types that were asked for."""
    engine = load_bundle(path).network.entry()["engine"]
    assert (engine["checked_nodes"] > 10 and engine["plan_bytes"] > 0) if ENGINE else engine is None


def as_grid(tokens: Any, side: int = 4) -> np.ndarray:
    """(B, T, C) -> (B, C, side, side)."""
    return np.ascontiguousarray(tokens.transpose(1, 2).unflatten(2, (side, side)).numpy())


@pytest.mark.golden
def test_v1_encoder_of_images(tmp_path: Path) -> None:
    golden = load_golden("vitok-v1-image")
    session = dexport.load(build(f"{V1}-encoder", golden, tmp_path / "out", (64, 64)))
    results = session(image=golden.inputs["x"][:, :, 0].numpy())
    assert_golden(results["mean"], as_grid(golden.outputs["mean"]))
    assert_golden(np.exp(0.5 * results["logvar"]), as_grid(golden.outputs["std"]))


@pytest.mark.golden
def test_v1_decoder_of_videos_in_half_precision(tmp_path: Path) -> None:
    golden = load_golden("vitok-v1-video")
    path = build("vitok-v1-s-b-4x8-decoder", golden, tmp_path / "out", (4, 4), precision="fp16", **ENGINE)
    assert_engine(path)
    out = dexport.load(path)(z=golden.outputs["mean"].numpy())["video"]
    wanted = golden.outputs["recon"].numpy()
    assert out.shape == wanted.shape
    assert np.linalg.norm(out - wanted) < 3e-3 * np.linalg.norm(wanted)
    with pytest.raises(UsageError, match="a decoder takes a grid of latents"):
        VaeDecoder(dexport.load(path), latent_scale=1.0)


@pytest.mark.golden
def test_v2_encoder_of_tokens_ignores_padding(tmp_path: Path) -> None:
    golden = load_golden("vitok-v2-naflex")
    path = build(f"{V2}-encoder", golden, tmp_path / "out", (32, 32), settings={"naflex": True}, **ENGINE)
    assert_engine(path)
    places = {name: golden.inputs[name].numpy().astype(np.int64) for name in ("row_idx", "col_idx", "patch_mask")}
    z = dexport.load(path)(patches=golden.inputs["patches"].numpy(), **places)["z"]
    valid = places["patch_mask"] == 1
    assert_golden(z[valid], golden.outputs["z"].numpy()[valid])


@pytest.mark.golden
def test_v2_decoder_of_images(tmp_path: Path) -> None:
    golden = load_golden("vitok-v2-image")
    path = build(f"{V2}-decoder", golden, tmp_path / "out", (4, 4))
    out = dexport.load(path)(z=as_grid(golden.outputs["z"]))["image"]
    assert_golden(out, golden.outputs["image"].numpy())


def test_a_denoiser_of_its_codes_samples_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_golden("vitok-v1-image")
    decoder = find_recipe(f"{V1}-decoder")
    narrow = replace(decoder, config={**decoder.config, **golden.config, "encoder": False})
    others = [recipe for recipe in recipes.BUILT_IN if recipe.name != narrow.name]
    monkeypatch.setattr(recipes, "BUILT_IN", (*others, narrow))
    save_file(golden.weights, tmp_path / "vitok.safetensors")
    dit = find_recipe("dit-s-2")
    assert dit.sampling is not None
    denoiser = replace(dit, name="dit-vitok", sampling=replace(dit.sampling, decoder=narrow.name, latent_scale=1.0))
    dexport.build(
        denoiser,
        tmp_path / "out",
        settings={"in_channels": 8, "patch_size": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 4},
        latent=(4, 4),
        with_decoder=True,
        decoder_checkpoint=str(tmp_path / "vitok.safetensors"),
        parity=False,
    )
    program = OpenProgram.open(tmp_path / "out")
    generate(program, tmp_path / "grid.png", SampleRequest((1,), settings={"steps": 2}))
    assert Image.open(tmp_path / "grid-images" / "00000.png").size == (64, 64)


def test_a_file_without_the_half_is_refused(tmp_path: Path) -> None:
    golden = load_golden("vitok-v2-image")
    encoder = {name: value for name, value in golden.weights.items() if name.startswith(("patch_", "to_c", "encoder"))}
    with pytest.raises(InputError, match=r"decoder_embed\.weight"):
        build(f"{V2}-decoder", replace(golden, weights=encoder), tmp_path / "out", (4, 4))


@pytest.mark.parametrize(
    ("recipe", "settings", "latent", "reason"),
    [
        (f"{V1}-encoder", {}, (100, 100), "must be positive multiples of 16"),
        (f"{V1}-encoder", {"posemb": "learned"}, (512, 512), "32x32 tokens is not the 16x16"),
        ("vitok-v1-s-b-4x8-decoder", {}, (8, 8), "8x8 tokens is not the 16x16"),
        (f"{V2}-decoder", {"channels_per_token": 0}, None, "empty"),
    ],
)
def test_what_does_not_fit_is_refused(
    recipe: str, settings: dict[str, Any], latent: tuple[int, int] | None, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        resolve(find_recipe(recipe), settings, latent)


def test_sizes_of_inputs_and_outputs() -> None:
    def shapes(recipe: str, **settings: Any) -> dict[str, tuple[int | str, ...]]:
        signature = resolve(find_recipe(recipe), settings).signature
        return {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}

    assert shapes(f"{V1}-decoder") == {"z": ("B", 16, 16, 16), "image": ("B", 3, 256, 256)}
    assert shapes("vitok-v1-s-b-4x8-encoder") == {
        "video": ("B", 3, 16, 128, 128),
        "mean": ("B", 1024, 16),
        "logvar": ("B", 1024, 16),
    }
    assert shapes("vitok-v2-5b-f32x64-encoder") == {"image": ("B", 3, 256, 256), "z": ("B", 64, 8, 8)}
    assert shapes(f"{V2}-encoder", naflex=True) == {
        "patches": ("B", 256, 768),
        "row_idx": ("B", 256),
        "col_idx": ("B", 256),
        "patch_mask": ("B", 256),
        "z": ("B", 256, 16),
    }
    codes = {"simple": False, "posemb": "learned", "code_length": 32, "lengths": [16, 32]}
    assert shapes(f"{V1}-decoder", **codes) == {
        "z": ("B", 32, 16),
        "token_count": ("B",),
        "image": ("B", 3, 256, 256),
    }
