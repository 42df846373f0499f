"""A program of a new kind, with two graphs to a network: one file, one recipe, and every command works on it."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import dexport
from dexport.bundle import MODEL_DATA, load_bundle
from dexport.cli import main
from dexport.errors import InputError
from dexport.runtime.draws import Draws
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import LATENTS, PICTURES, Program, Request
from dexport.runtime.service import Picture, make_pictures

EXAMPLE = Path(__file__).parents[1] / "examples" / "average"
MODULES = ("average_program", "average_recipe")


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as pip would install it, for this module's tests."""
    site = tmp_path_factory.mktemp("site")
    facts = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    for name in MODULES:
        shutil.copy(EXAMPLE / f"{name}.py", site)
    record = site / f"{facts['name'].replace('-', '_')}-{facts['version']}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {facts['name']}\nVersion: {facts['version']}\n")
    groups = facts["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (record / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield site
    for name in MODULES:
        sys.modules.pop(name, None)
    Program.known.pop("average", None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair") / "pair"
    dexport.build("average-of-two", path, precision="fp16", profile="ci")
    return path


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_one_bundle_holds_two_networks_of_two_graphs(pair: Path) -> None:
    bundle = load_bundle(pair)
    assert bundle.status == "passed"
    assert bundle.manifest["program"]["kind"] == "average"
    assert {name: list(network.graphs) for name, network in bundle.networks.items()} == {
        "denoiser.0": ["full", "reuse"],
        "denoiser.1": ["full", "reuse"],
    }
    assert len(list(pair.rglob(MODEL_DATA))) == 2
    first, second = (path.read_bytes() for path in sorted(pair.rglob(MODEL_DATA)))
    assert first != second  # random weights of two networks differ


def test_the_second_graph_of_a_network_adds_no_weights(pair: Path, tmp_path: Path) -> None:
    dexport.build("trunk", tmp_path / "full", precision="fp16", graphs=("full",), parity=False)
    assert (tmp_path / "full" / MODEL_DATA).read_bytes() == (pair / "networks/denoiser.0" / MODEL_DATA).read_bytes()


def test_the_program_calls_both_networks_in_turns(pair: Path) -> None:
    calls = dexport.open_program(pair).with_settings(steps=3).rehearse()
    assert [(call.index, call.graph) for call in calls] == [
        *((0, "full"), (1, "full")),
        *((0, "reuse"), (1, "reuse")),
        *((0, "full"), (1, "full")),
    ]


def test_a_run_is_the_average_by_hand(pair: Path) -> None:
    program = dexport.open_program(pair).with_settings(steps=2)
    found = program.results(Request(2, (3, 8)), Draws(0, images=[0, 1]))
    sessions = {
        (name, graph): dexport.load(pair, network=f"denoiser.{name}", graph=graph)
        for name in (0, 1)
        for graph in ("full", "reuse")
    }
    x, time, labels = Draws(0, images=[0, 1]).normal((2, 1, 8, 8)), np.ones(2, np.float32), np.array([3, 8])
    first = [sessions[name, "full"](x=x, t=time, y=labels) for name in (0, 1)]
    x = x - np.mean([each["out"] for each in first], axis=0) / 2
    second = [sessions[name, "reuse"](x=x, t=time / 2, features=first[name]["features"]) for name in (0, 1)]
    x = x - np.mean([each["out"] for each in second], axis=0) / 2
    np.testing.assert_allclose(found[LATENTS], x, rtol=1e-5, atol=1e-5)
    assert found[PICTURES].shape == (2, 8, 8, 1)


def test_sample_makes_pictures(pair: Path, tmp_path: Path) -> None:
    result = run("sample", pair, "-o", tmp_path / "out.png", "--classes", "3,8", "--steps", "4")
    assert "2 images" in result.stdout and "average, steps 4" in result.stdout
    assert len(list((tmp_path / "out-images").glob("*.png"))) == 2


def test_validate_compares_every_graph_and_every_step(pair: Path) -> None:
    report = json.loads(run("validate", pair, "--json", "--no-record", "--steps", "5").stdout)
    assert report["verdict"] == "passed"
    graphs = [f"denoiser.{number} {graph}" for number in (0, 1) for graph in ("full", "reuse")]
    assert list(report["forward"]) == graphs
    assert len(report["trajectory"]["states"]) == 5
    assert len(report["trajectory"]["evaluations"]) == 2 * 5
    assert report["trajectory"]["states"][0]["t"] == 1


def test_bench_and_diff_take_one_graph(pair: Path) -> None:
    run("bench", pair, "--network", "denoiser.1", "--graph", "reuse", "--rounds", "2")
    assert "nothing found" in run("diff", pair, "--network", "denoiser.1", "--graph", "reuse").stdout


def test_sweep_takes_its_settings(pair: Path, tmp_path: Path) -> None:
    run("sweep", pair, "--over", "steps=2,4", "-o", tmp_path / "sweep.json")
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    evaluations = [[sum(graphs.values()) for graphs in point["evaluations"]] for point in points]
    assert [point["value"] for point in points] == [2, 4]
    assert evaluations == [[2, 2], [4, 4]]


def test_info_shows_its_tree(pair: Path) -> None:
    shown = run("info", pair).stdout
    for expected in ("average, condition.kind class", "├─ denoiser.0: Trunk trunk", "└─ reuse: reuse.onnx"):
        assert expected in shown


def test_recipes_and_info_show_the_system() -> None:
    assert "of trunk, trunk" in run("recipes").stdout
    assert "denoiser trunk, trunk" in " ".join(run("info", "average-of-two").stdout.split())


def test_triton_serves_the_graphs_and_the_program(pair: Path, tmp_path: Path) -> None:
    run("pack", pair, "--triton", tmp_path / "repository")
    models = sorted(path.name for path in (tmp_path / "repository").iterdir())
    assert models == ["pair_0", "pair_0_reuse", "pair_1", "pair_1_reuse", "pair_pipeline"]
    config = (tmp_path / "repository" / "pair_pipeline" / "config.pbtxt").read_text()
    assert 'name: "steps", data_type: TYPE_INT32' in config
    assert 'name: "image", data_type: TYPE_UINT8, dims: [8, 8, 1]' in config


def test_a_service_runs_it(pair: Path) -> None:
    program = OpenProgram.open(pair)
    (pictures,) = make_pictures(program, [[Picture(3, 0, {"steps": 4}), Picture(8, 1, {"steps": 2})]], 2)
    alone = program.with_settings(steps=4).results(Request(1, (3,)), Draws(0, images=[0]))[PICTURES]
    np.testing.assert_array_equal(pictures[0], alone[0])  # type: ignore[index]


@pytest.mark.parametrize("scheme", ["weight", "w8a8"])
def test_its_networks_are_quantised_along_its_run(tmp_path: Path, scheme: str) -> None:
    images = {"calibration_images": 4} if scheme == "w8a8" else {}
    dexport.build("average-of-two", tmp_path / "out", int8=scheme, parity=False, **images)
    bundle = load_bundle(tmp_path / "out")
    assert all(
        {"weight": "int8", "w8a8": "w8a8"}[scheme] in network.manifest["precision"]["layers"].values()
        for network in bundle.networks.values()
    )
    results = OpenProgram(bundle).results(Request(1, (3,)), Draws(0, images=[0]))
    assert np.isfinite(results[LATENTS]).all()


def test_a_kind_that_is_not_installed(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dexport.runtime.programs.entry_points", lambda **_: ())
    monkeypatch.delitem(Program.known, "average", raising=False)
    with pytest.raises(InputError, match="no program of the kind average is installed here"):
        OpenProgram.open(pair)
