"""``--fold-steps`` from the build to the picture: the same values at the times of the steps, and no other times."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dexport
from dexport.bundle import Bundle, load_bundle
from dexport.cli import main
from dexport.contract import SCALE, STATE, TIME
from dexport.errors import InputError, UsageError
from dexport.exporter.cache import key_of
from dexport.exporter.options import BuildOptions, Player
from dexport.exporter.rebuild import options_of
from dexport.exporter.recipes import find_recipe
from dexport.exporter.resolve import resolve_network
from dexport.exporter.reuse import facts_of
from dexport.exporter.system import plan_system
from dexport.exporter.trajectory import with_table
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import Origin
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import feed_of
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import LATENTS, Request
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


def times_of(path: Path) -> np.ndarray:
    """The times of the table."""
    network = load_bundle(path).network
    port = network.graphs[network.main_graph].input(TIME)
    assert port is not None
    return np.array(port.choices, np.float32)


def feeds(path: Path) -> dict[str, np.ndarray]:
    """Inputs with one row for each time of the table."""
    network = load_bundle(path).network
    graph = network.graphs[network.main_graph]
    state, scale = graph.input(STATE), graph.input(SCALE)
    assert state is not None
    times = times_of(path)
    rng, (_, *shape) = np.random.default_rng(0), state.shape
    x, y = rng.standard_normal((len(times), *shape), np.float32), rng.integers(0, 4, len(times))
    given = feed_of(graph, None)(x, times, y)
    return given if scale is None else {**given, scale.name: np.float32(1.4)}


@pytest.mark.parametrize("name", ["folded", "dimr"])
def test_every_time_of_the_table_gives_what_pytorch_gives(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    given = feeds(path)
    wanted, got = reference_of(load_bundle(path).network)(**given)["out"], dexport.load(path)(**given)["out"]
    for row, reference in zip(got, wanted, strict=True):
        assert compare(reference, row).relative_l2 < 5e-6


def test_what_depends_on_time_alone_is_gone(plain: Path, folded: Path, dimr: Path) -> None:
    before, after = load_bundle(plain).network, load_bundle(folded).network
    tables = after.manifest["sizes"]["time_tables"]
    assert tables["tables"] == 1
    assert tables["bytes"] == STEPS * NARROW["hidden_size"] * 4
    assert tables["weight_bytes"] > tables["bytes"]
    operators = [sum(network.entry()["ops"]["final"].values()) for network in (before, after)]
    assert operators[0] - operators[1] == tables["nodes"]
    assert not any(name.startswith("t_embedder") and "Gather" not in name for name in after.entry()["nodes"])
    assert before.manifest["sizes"]["time_tables"] is None
    network = load_bundle(dimr).network
    assert network.manifest["status"] == "passed"
    assert network.entry()["ops"]["final"]["ArgMin"] == 1
    assert "Sigmoid" not in network.entry()["ops"]["final"]


def test_the_manifest_has_the_times(folded: Path, dimr: Path) -> None:
    bundle = load_bundle(folded)
    assert bundle.manifest["program"]["steps"] == bundle.network.manifest["folded"] == STEPS
    assert times_of(folded).tolist() == [999, 799, 599, 400, 200, 0]
    solver = make_sampler("dpm-solver", STEPS)
    assert isinstance(solver, DPMSolver)
    expected = 8 * solver.times()[:-1] - 4  # in the unit of its input, the logarithm of the signal to noise
    np.testing.assert_allclose(times_of(dimr), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver", "edm", "flow"])
def test_times_of_a_table_are_those_that_the_sampler_asks_for(name: str) -> None:
    recipe = find_recipe("dit-fashion")
    assert recipe.sampling is not None
    recipe = replace(recipe, sampling=replace(recipe.sampling, sampler=name))
    table = with_table(resolve(recipe, {**NARROW, "learn_sigma": False}), 7).table
    assert table is not None and table.steps == 7
    times = table.times
    assert len(set(times)) == len(times) == 7
    assert list(times) == sorted(times, reverse=True)
    assert all(float(np.float32(time)) == time for time in times)


def test_pictures_are_those_of_the_plain_graph(plain: Path, folded: Path) -> None:
    ours, theirs = OpenProgram.open(folded), OpenProgram.open(plain).with_settings(steps=STEPS)
    latents, expected = (
        each.results(Request(2, (1, 2)), Draws(0, images=range(2)))[LATENTS] for each in (ours, theirs)
    )
    assert_golden(latents, expected)


def test_other_steps_are_refused(folded: Path, tmp_path: Path) -> None:
    program = OpenProgram.open(folded)
    program.with_settings(sampler="ddim")
    for steps in (2 * STEPS, STEPS - 1):
        with pytest.raises(UsageError, match=f"was built for {STEPS} times") as refused:
            program.with_settings(steps=steps)
        assert "leave out --steps" in refused.value.hint
    command = ["sample", str(folded), "--steps", "20", "-o", str(tmp_path / "s.png")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == UsageError.exit_code
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"was built for {STEPS} times"):
        validate(load_bundle(folded), settings={"steps": 20})


def test_validation_and_diff_stay_on_the_table(folded: Path, plain: Path) -> None:
    bundle = load_bundle(folded)
    result = validate(bundle, labels=[0])
    assert result.passed, [gate for gate in result.gates if gate.verdict != "pass"]
    assert set(result.forward[""].timesteps) <= set(times_of(folded))
    assert result.trajectory is not None
    assert len(result.trajectory.states) == STEPS
    assert diff(bundle, states=TRAJECTORY).passed
    for pair in ((bundle, load_bundle(plain)), (load_bundle(plain), bundle)):
        with pytest.raises(UsageError, match="take other times"):
            diff(*pair)


def test_stitched_denoisers_need_the_same_times(folded: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"was built for {STEPS} times"):
        dexport.build(None, tmp_path / "other", stitch=f"{folded}:0.4,{plain}:0.6")
    dexport.build(None, tmp_path / "mixed", stitch=f"{plain}:0.4,{folded}:0.6")  # runs the table's times
    dexport.build(None, tmp_path / "both", stitch=f"{folded}:0.4,{folded}:0.6")
    for name in ("mixed", "both"):
        program = OpenProgram.open(tmp_path / name)
        assert np.isfinite(program.results(Request(1, (1,)), Draws(0, images=[0]))[LATENTS]).all()
        with pytest.raises(UsageError, match=f"was built for {STEPS} times"):
            program.with_settings(steps=20)


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
    network = result.bundle.network
    assert network.manifest["precision"]["layers"][layer] == "int8"
    assert network.entry()["ops"]["final"]["DequantizeLinear"] == 1
    assert network.entry()["nodes"]["time_table/Sub"] == "float32"
    assert any(name.startswith(f"{layer}/") for name in network.entry()["nodes"])


def test_a_rebuild_and_the_cache_know_of_it(folded: Path, tmp_path: Path) -> None:
    _, options = options_of(load_bundle(folded), tmp_path, int8="weight")
    assert options.fold_steps == STEPS
    recipe, keys = find_recipe("dit-fashion"), set()
    for steps in (None, STEPS, STEPS + 1):
        chosen = BuildOptions(tmp_path, settings=NARROW, fold_steps=steps)
        keys.add(key_of(facts_of(resolve_network(recipe, chosen), Origin("random", seed=0), chosen)))
    assert len(keys) == 3


def test_a_decoder_has_no_times(tmp_path: Path) -> None:
    players = {"decoder": (Player(),)}
    options = BuildOptions(tmp_path, settings=NARROW, fold_steps=STEPS, players=players)
    denoiser, decoder = plan_system("dit-s-2", options).parts
    assert (denoiser.options.fold_steps, decoder.options.fold_steps) == (STEPS, None)
    assert decoder.variant is not None and decoder.variant.table is None


@pytest.mark.parametrize(
    ("recipe", "steps", "message"),
    [
        ("sd-vae-decoder", 10, "has no steps to fold"),
        ("dit-s-2", 1001, "1001 steps were asked for"),
        ("dit-s-2", 0, "steps 0: Expected `int` >= 1"),
    ],
)
def test_what_cannot_be_folded_is_refused(recipe: str, steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_table(resolve(find_recipe(recipe)), steps)


@pytest.mark.parametrize("choices", [[999.0, 0.0], ["0"], "x", [None], None])
def test_a_manifest_with_another_table_is_refused(folded: Path, choices: Any) -> None:
    manifest = copy.deepcopy(dict(load_bundle(folded).manifest))
    manifest["networks"]["denoiser"]["graphs"]["model"]["inputs"][1]["choices"] = choices
    with pytest.raises(InputError, match=r"manifest\.json"):
        OpenProgram(Bundle(folded, manifest))
