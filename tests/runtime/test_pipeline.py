"""Bundles as generators: sampler, guidance, stitching and decoder come from the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dexport.runtime.pipeline import Pipeline

import dexport
from dexport.bundle import MANIFEST, load_bundle
from dexport.errors import GateError, InputError, UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import FIRST_FOUR, guided
from dexport.runtime.samplers import make_sampler, sample
from dexport.validate.metrics import compare
from tests.bundles import build_narrow

LABELS = [3, 7]
NULL = 10
STEPS = 4


def latents(pipeline: Pipeline, **options: object) -> np.ndarray:
    return pipeline.sample(LABELS, Draws(0, images=[0, 1]), sampler=pipeline.sampler(steps=STEPS), **options)  # type: ignore[arg-type]


def test_the_manifest_says_how_to_sample(plain: Path) -> None:
    assert load_bundle(plain).manifest["sampling"] == {
        "schedule": "linear betas 1e-4..2e-2, 1000 steps",
        "prediction": "epsilon, learned variance",
        "sampler": "ddpm",
        "steps": 50,
        "folded": None,
        "latent_scale": 1.0,
        "decoder": "pixel-shuffle-2",
        "class_names": [
            "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
        ],
        "classes": 10,
        "null_label": NULL,
        "guidance": {"rule": "first four channels", "default_scale": 2.0},
    }  # fmt: skip


def test_a_pipeline_is_the_sampler_around_the_session(plain: Path) -> None:
    by_hand = sample(
        make_sampler("ddpm", STEPS),
        guided(dexport.load(plain), LABELS, 3.0, NULL, FIRST_FOUR),
        Draws(0, images=[0, 1]),
        (2, 4, 16, 16),
    )
    np.testing.assert_array_equal(latents(Pipeline.open(plain), cfg_scale=3.0), by_hand)


def test_pictures_of_a_pixel_shuffled_latent(plain: Path) -> None:
    images = Pipeline.open(plain).images(np.linspace(-1, 1, 1024, dtype=np.float32).reshape(1, 4, 16, 16))
    assert (images.shape, images.dtype) == ((1, 32, 32, 1), np.uint8)
    assert images[0, :2, :2, 0].tolist() == [[0, 64], [128, 191]]


def test_a_fused_bundle_gives_the_same_latents(plain: Path, tmp_path: Path) -> None:
    fused = build_narrow(tmp_path / "fused", guidance="fused")
    on_host, in_graph = (latents(Pipeline.open(path), cfg_scale=3.0) for path in (plain, fused))
    assert compare(on_host, in_graph).relative_l2 < 1e-5


def test_default_scale_is_the_systems(plain: Path) -> None:
    pipeline = Pipeline.open(plain)
    np.testing.assert_array_equal(latents(pipeline), latents(pipeline, cfg_scale=2.0))


@pytest.mark.parametrize("label", [-1, 10, 1000])
def test_labels_that_the_model_does_not_have(plain: Path, label: int) -> None:
    with pytest.raises(UsageError, match=f"no class {label}: the model has 10") as refused:
        Pipeline.open(plain).denoiser([label])
    assert "0 to 9" in refused.value.hint


def test_guidance_without_a_null_class(tmp_path: Path) -> None:
    settings = {"hidden_size": 16, "depth": 1, "num_heads": 2, "class_dropout_prob": 0}
    dexport.build("dit-fashion", tmp_path / "b", settings=settings, parity=False)
    pipeline = Pipeline.open(tmp_path / "b")
    assert pipeline.default_scale == 1
    assert latents(pipeline).shape == (2, 4, 16, 16)
    with pytest.raises(UsageError, match="needs a null class"):
        pipeline.denoiser(LABELS, 2.0)


def test_an_unconditional_network_in_pixel_space(tmp_path: Path) -> None:
    settings = {"channels": 16, "num_heads": 2, "num_blocks": [1, 1, 1]}
    dexport.build("diffit-image-32", tmp_path / "b", settings=settings, parity=False)
    pipeline = Pipeline.open(tmp_path / "b")
    assert pipeline.classes is None
    x = pipeline.sample([], Draws(0, images=[0]), sampler=pipeline.sampler(steps=2))
    assert (x.shape, x.dtype) == ((1, 3, 32, 32), np.float32)
    assert pipeline.images(x).shape == (1, 32, 32, 3)
    with pytest.raises(UsageError, match="null class"):
        pipeline.denoiser([], 2.0)


def test_samplers_that_share_the_schedule(plain: Path) -> None:
    pipeline = Pipeline.open(plain)
    assert type(pipeline.sampler("ddim", 5)).__name__ == "DDIM"
    for name in ("edm", "flow", "dpm-solver", "euler"):
        with pytest.raises(UsageError, match=f"{name!r} does not share"):
            pipeline.sampler(name)


@pytest.mark.parametrize("steps", [1, 1001])
def test_steps_outside_of_the_schedule(plain: Path, steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} steps were asked for"):
        Pipeline.open(plain).sampler(steps=steps)


def test_latents_without_a_decoder(tmp_path: Path) -> None:
    path = build_narrow(tmp_path / "b", "dit-s-2")
    with pytest.raises(UsageError, match="has no decoder") as refused:
        Pipeline.open(path)
    assert "--with-decoder" in refused.value.hint


def test_a_bundle_that_is_no_denoiser(plain: Path) -> None:
    manifest = json.loads((plain / MANIFEST).read_text())
    bundle = type(load_bundle(plain))(plain, {**manifest, "sampling": None})
    with pytest.raises(InputError, match="holds no denoiser"):
        Pipeline(bundle)


# Stitched


def test_the_ends_of_a_stitched_bundle_are_its_parts(plain: Path, other: Path, stitched: Path) -> None:
    pipeline = Pipeline.open(stitched)
    np.testing.assert_array_equal(latents(pipeline, fractions=(1.0, 0.0)), latents(Pipeline.open(plain)))
    np.testing.assert_array_equal(latents(pipeline, fractions=(0.0, 1.0)), latents(Pipeline.open(other)))


def test_a_stitched_bundle_samples_with_its_own_fractions(stitched: Path) -> None:
    pipeline = Pipeline.open(stitched)
    assert pipeline.fractions == (0.4, 0.6)
    between = latents(pipeline)
    np.testing.assert_array_equal(between, latents(pipeline, fractions=(0.4, 0.6)))
    assert not np.array_equal(between, latents(pipeline, fractions=(0.0, 1.0)))


def test_fractions_for_a_single_denoiser(plain: Path) -> None:
    with pytest.raises(UsageError, match="1 denoisers and 2 fractions"):
        Pipeline.open(plain).denoiser(LABELS, fractions=(0.5, 0.5))


def test_a_stitched_bundle_is_not_one_session(stitched: Path) -> None:
    with pytest.raises(UsageError, match="2 denoisers, not one model"):
        dexport.load(stitched)


@pytest.mark.parametrize(("scale", "largest"), [(None, 2), (1.0, 4)])
def test_an_engine_limits_the_batch_and_guidance_halves_it(plain: Path, scale: float | None, largest: int) -> None:
    pipeline = Pipeline.open(plain)
    assert pipeline.largest_batch(scale) is None
    pipeline._provider = "tensorrt"
    assert pipeline.largest_batch(scale) == largest


def test_black_pictures_are_never_made_of_nan(plain: Path) -> None:
    def broken(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"out": np.full((len(inputs["x"]), 8, 16, 16), np.nan, np.float32)}

    broken.runner = "broken"  # type: ignore[attr-defined]
    with pytest.raises(GateError, match="not finite"):
        latents(Pipeline(load_bundle(plain), sessions=[broken]))  # type: ignore[list-item]
