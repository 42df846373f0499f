"""``--fold-steps`` from the build to the picture: the same values at the times of the steps, and no other times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dexport
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.exporter.build import BuildOptions, decoder_options, resolve_options
from dexport.exporter.cache import key_of
from dexport.exporter.rebuild import options_of
from dexport.exporter.recipes import find_recipe
from dexport.exporter.reuse import facts_of
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import Origin
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import feed_of
from dexport.runtime.samplers import DPMSolver, make_sampler
from dexport.validate.compare.diff import TRAJECTORY, diff
from dexport.validate.metrics import compare
from dexport.validate.references.recipe_network import reference_of
from dexport.validate.validate import validate
from tests.bundles import NARROW, build_narrow
from tests.exporter.test_dimr import SMALL as DIMR
from tests.golden import assert_golden

STEPS = 6


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_narrow(tmp_path_factory.mktemp("folded") / "bundle", fold_steps=STEPS)


@pytest.fixture(scope="module")
def dimr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Guidance in the graph, so that the times are doubled, and one of its own that grows with time."""
    folder = tmp_path_factory.mktemp("dimr")
    dexport.build(
        "dimr-xl-2r",
        folder / "bundle",
        settings={**DIMR, "cfg_scale_pow": 2.0},
        latent=(8, 8),
        guidance="fused",
        fold_steps=STEPS,
        profile="ci",
    )
    return folder / "bundle"


def feeds(path: Path) -> dict[str, np.ndarray]:
    """Inputs with one row for each time of the table."""
    manifest = load_bundle(path).manifest
    times = np.array(manifest["sampling"]["folded"]["times"], np.float32)
    rng, (_, *shape) = np.random.default_rng(0), manifest["io"]["inputs"][0]["shape"]
    x, y = rng.standard_normal((len(times), *shape), np.float32), rng.integers(0, 4, len(times))
    given = feed_of([spec["name"] for spec in manifest["io"]["inputs"]])(x, times, y)
    return given if manifest["guidance"] == "none" else {**given, "cfg_scale": np.float32(1.4)}


@pytest.mark.parametrize("name", ["folded", "dimr"])
def test_every_time_of_the_table_gives_what_pytorch_gives(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    given = feeds(path)
    wanted, got = reference_of(load_bundle(path))(**given)["out"], dexport.load(path)(**given)["out"]
    for row, reference in zip(got, wanted, strict=True):
        assert compare(reference, row).relative_l2 < 5e-6


def test_what_depends_on_time_alone_is_gone(plain: Path, folded: Path, dimr: Path) -> None:
    before, after = load_bundle(plain).manifest, load_bundle(folded).manifest
    tables = after["sizes"]["time_tables"]
    assert tables["tables"] == 1
    assert tables["bytes"] == STEPS * NARROW["hidden_size"] * 4
    assert tables["weight_bytes"] > tables["bytes"]
    assert sum(before["ops"]["final"].values()) - sum(after["ops"]["final"].values()) == tables["nodes"]
    assert not any(name.startswith("t_embedder") and "Gather" not in name for name in after["precision"]["nodes"])
    assert before["sizes"]["time_tables"] is None
    manifest = load_bundle(dimr).manifest
    assert manifest["status"] == "passed"
    assert manifest["ops"]["final"]["ArgMin"] == 1
    assert "Sigmoid" not in manifest["ops"]["final"]


def test_the_manifest_has_the_times(folded: Path, dimr: Path) -> None:
    facts = load_bundle(folded).manifest["sampling"]
    assert facts["steps"] == facts["folded"]["steps"] == STEPS
    assert facts["folded"]["times"] == [999, 799, 599, 400, 200, 0]
    solver = make_sampler("dpm-solver", STEPS)
    assert isinstance(solver, DPMSolver)
    expected = (solver.times()[:-1] * 1000).astype(np.float32)
    np.testing.assert_array_equal(load_bundle(dimr).manifest["sampling"]["folded"]["times"], expected)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver", "edm", "flow"])
def test_times_of_a_sampler_are_those_that_it_asks_for(name: str) -> None:
    times = evaluated_times(make_sampler(name, 7))
    assert len(set(times)) == len(times) == 7
    assert list(times) == sorted(times, reverse=True)
    assert all(float(np.float32(time)) == time for time in times)


def test_pictures_are_those_of_the_plain_graph(plain: Path, folded: Path) -> None:
    ours, theirs = Pipeline.open(folded), Pipeline.open(plain)
    latents = ours.sample([1, 2], Draws(0, images=range(2)))
    expected = theirs.sample([1, 2], Draws(0, images=range(2)), sampler=theirs.sampler(steps=STEPS))
    assert_golden(latents, expected)


def test_other_steps_are_refused(folded: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.open(folded)
    pipeline.sampler("ddim")
    for steps in (2 * STEPS, STEPS - 1):
        with pytest.raises(UsageError, match=f"was built for the times of {STEPS} steps") as refused:
            pipeline.sampler(steps=steps)
        assert f"--steps {STEPS}" in refused.value.hint
    command = ["sample", str(folded), "--steps", "20", "-o", str(tmp_path / "s.png")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == UsageError.exit_code
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="was built for the times"):
        validate(load_bundle(folded), steps=20)


def test_validation_and_diff_stay_on_the_table(folded: Path, plain: Path) -> None:
    bundle = load_bundle(folded)
    result = validate(bundle, labels=[0])
    assert result.passed, [gate for gate in result.gates if gate.verdict != "pass"]
    assert set(result.forward[""].timesteps) <= set(bundle.manifest["sampling"]["folded"]["times"])
    assert result.trajectory is not None
    assert len(result.trajectory.states) == STEPS
    assert diff(bundle, states=TRAJECTORY).passed
    for pair in ((bundle, load_bundle(plain)), (load_bundle(plain), bundle)):
        with pytest.raises(UsageError, match="take other times"):
            diff(*pair)


def test_stitched_denoisers_need_the_same_times(folded: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="times: 'any' in 0-bundle, 'those of 6 ddpm steps' in 1-bundle"):
        dexport.build(None, tmp_path / "mixed", stitch=f"{plain}:0.4,{folded}:0.6")
    dexport.build(None, tmp_path / "both", stitch=f"{folded}:0.4,{folded}:0.6")
    pipeline = Pipeline.open(tmp_path / "both")
    assert np.isfinite(pipeline.sample([1], Draws(0, images=[0]))).all()
    with pytest.raises(UsageError, match="was built for the times"):
        pipeline.sampler(steps=20)


def test_with_half_precision_and_a_quantised_layer_in_the_way(tmp_path: Path) -> None:
    layer = "t_embedder.mlp.0"
    result = dexport.build(
        "dit-fashion",
        tmp_path / "out",
        settings=NARROW,
        profile="ci",
        precision="fp16",
        precision_map={layer: "int8"},
        fold_steps=STEPS,
    )
    assert result.verdict is not None
    assert result.verdict.passed
    manifest = result.bundle.manifest
    assert manifest["precision"]["layers"][layer] == "int8"
    assert manifest["ops"]["final"]["DequantizeLinear"] == 1
    assert manifest["precision"]["nodes"]["time_table/Sub"] == "float32"
    assert any(name.startswith(f"{layer}/") for name in manifest["precision"]["nodes"])


def test_a_rebuild_and_the_cache_know_of_it(folded: Path, tmp_path: Path) -> None:
    _, options = options_of(load_bundle(folded), tmp_path, int8="weight")
    assert options.fold_steps == STEPS
    recipe, keys = find_recipe("dit-fashion"), set()
    for steps in (None, STEPS, STEPS + 1):
        chosen = BuildOptions(tmp_path, settings=NARROW, fold_steps=steps)
        keys.add(key_of(facts_of(resolve_options(recipe, chosen), Origin("random", seed=0), chosen)))
    assert len(keys) == 3


def test_a_decoder_has_no_times(tmp_path: Path) -> None:
    draft: Any = type("Draft", (), {"path": tmp_path})
    options = BuildOptions(tmp_path, fold_steps=STEPS)
    assert decoder_options(draft, resolve(find_recipe("sd-vae-decoder")), options).fold_steps is None


@pytest.mark.parametrize(
    ("recipe", "steps", "message"),
    [
        ("sd-vae-decoder", 10, "is no denoiser: it has no steps to fold"),
        ("dit-s-2", 1001, "1001 steps were asked for"),
        ("dit-s-2", 0, "0 steps were asked for"),
    ],
)
def test_what_cannot_be_folded_is_refused(recipe: str, steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(find_recipe(recipe), fold_steps=steps)


@pytest.mark.parametrize("recorded", [{}, {"steps": 3}, {"steps": 3, "times": ["0"]}, {"steps": None, "times": []}])
def test_a_manifest_with_half_a_table_is_refused(folded: Path, recorded: dict[str, Any]) -> None:
    bundle = load_bundle(folded)
    bundle.manifest["sampling"]["folded"] = recorded
    with pytest.raises(InputError, match=r"sampling\.folded"):
        check_denoiser(bundle)
