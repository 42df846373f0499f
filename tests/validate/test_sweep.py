"""The sweep over shares of a stitched pair."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import dexport
from dexport.cli import main
from dexport.cli.sweep_points import SHARE, points_of
from dexport.errors import MachineError, UsageError
from dexport.runtime.opened import OpenProgram
from dexport.validate.sweep import Point, Sweep, sweep


def swept(path: Path, values: list[Any], setting: str = "", **options: Any) -> Sweep:
    settings = {name: options.pop(name) for name in ("steps", "cfg_scale") if name in options}
    program = OpenProgram.open(path).with_settings(**settings)
    return sweep(program, *points_of(program, setting, values), **options)


def counts(point: Point) -> tuple[int, ...]:
    """Evaluations of each network."""
    return tuple(sum(graphs.values()) for graphs in point.evaluations)


def test_evaluations_move_from_the_second_to_the_first(stitched: Path) -> None:
    result = swept(stitched, [0.5, 1.0], steps=4, count=1, batch=4)
    assert result.over == SHARE
    assert [point.value for point in result.points] == [0.0, 0.5, 1.0]
    assert [counts(point) for point in result.points] == [(0, 4), (2, 2), (4, 0)]
    first, _, last = result.points
    assert (first.cost, first.relative_l2, first.frechet) == (1.0, 0.0, None)
    assert last.relative_l2 > 0


def test_one_denoiser_cannot_be_swept(plain: Path) -> None:
    with pytest.raises(UsageError, match="holds 1 denoisers"):
        swept(plain, [0.5])


def test_any_setting_of_a_program_is_swept(plain: Path) -> None:
    result = swept(plain, [6, 3], "steps", count=1, batch=4)
    assert (result.over, [point.value for point in result.points]) == ("steps", [6, 3])
    assert [point.evaluations for point in result.points] == [({"model": 6},), ({"model": 3},)]
    assert result.points[1].cost == pytest.approx(0.5)
    for setting, message in (("colour", "no setting 'colour'"), ("steps", "1 steps were asked for")):
        with pytest.raises(UsageError, match=message):
            swept(plain, [1], setting)


def test_the_command_writes_table_json_and_plot(stitched: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), np.uint8))
    arguments = ["sweep", stitched, "-o", tmp_path / "s.json", "--fractions", "0,1", "--steps", "4", "--reference"]
    result = CliRunner().invoke(main, [*map(str, arguments), str(tmp_path / "real.npz")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Fréchet distance (8x8 pixels) to 20 images" in result.stdout
    written = json.loads((tmp_path / "s.json").read_text())
    assert [point["value"] for point in written["points"]] == [0, 1]
    first, last = (point["frechet"] for point in written["points"])
    assert (first["delta"], first["low"], first["high"]) == (0, 0, 0)
    assert first["a"] > 0
    assert last["low"] <= last["delta"] == last["a"] - last["b"] <= last["high"]
    assert last["b"] == first["a"]
    assert Image.open(tmp_path / "s.png").size[0] > 600


def test_a_missing_plotter_is_noticed_before_the_work(
    stitched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(OpenProgram, "open", lambda *_: pytest.fail("work was done"))
    result = CliRunner().invoke(main, ["sweep", str(stitched), "-o", str(tmp_path / "s.json")])
    assert result.exit_code == MachineError.exit_code
    assert "pip install 'dexport[plots]'" in result.stderr


@pytest.mark.parametrize("fractions", ["a", "0,2"])
def test_other_fractions_are_refused(stitched: Path, tmp_path: Path, fractions: str) -> None:
    result = CliRunner().invoke(
        main, ["sweep", str(stitched), "-o", str(tmp_path / "s.json"), "--fractions", fractions]
    )
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "missing.npz"], "holds no images"),
        (["--reference", "text.npz"], "holds no images"),
        (["--fractions", "x"], "is not a list of numbers"),
        (["-o", "folder.json"], "is no regular file"),
        (["-o", "text.npz/s.json"], "is no folder"),
        (["-o", "plot.json"], "is no regular file"),
    ],
)
def test_bad_inputs_are_found_before_a_network_is_loaded(
    stitched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    def load(*_: object) -> None:
        pytest.fail("a network was loaded")

    monkeypatch.setattr("dexport.runtime.opened.open_session", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "plot.png").mkdir()
    (tmp_path / "text.npz").write_text("no zip")
    result = CliRunner().invoke(main, ["sweep", str(stitched), *options])
    assert result.exit_code in (2, 4), result.output
    assert message in result.stderr


WAYS: dict[str, tuple[str | Path, dict[str, Any]]] = {
    "edm": ("diffit-image-32", {"channels": 16, "num_heads": 2, "num_blocks": [1, 1, 1]}),
    "flow": (Path(__file__).parents[2] / "examples" / "my_backbone.py", {"width": 8, "cond": 16}),
}
"""A recipe of each sampler that does not count timesteps; the first is unconditional."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edm", [(0, 7), (3, 4), (7, 0)]),
        pytest.param("flow", [(0, 4), (2, 2), (4, 0)], marks=pytest.mark.slow),
    ],
)
def test_a_pair_whose_time_is_another(name: str, expected: list[tuple[int, int]], tmp_path: Path) -> None:
    recipe, settings = WAYS[name]
    dexport.build(str(recipe), tmp_path / "one", settings=settings, parity=False)
    dexport.build(None, tmp_path / "pair", stitch=f"{tmp_path / 'one'}:0.5,{tmp_path / 'one'}:0.5")
    result = swept(tmp_path / "pair", [0.5, 1], steps=4, cfg_scale=1.0, count=2, batch=20)
    assert [counts(point) for point in result.points] == expected
    assert result.images == 2 * (OpenProgram.open(tmp_path / "pair").classes or 1)
    assert [point.relative_l2 for point in result.points] == [0, 0, 0]  # the same network twice
