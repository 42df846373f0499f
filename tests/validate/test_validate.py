"""``dexport validate``: levels, exit codes, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import dexport
from dexport.bundle import Bundle, load_bundle
from dexport.cli import main
from dexport.errors import MachineError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.validate.gates import parse_limits
from dexport.validate.levels.trajectory import DEFAULT_SNR
from dexport.validate.validate import recipes_of, validate
from tests.bundles import build_narrow


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)], catch_exceptions=False)


def test_both_levels_of_a_clean_bundle(plain: Path, tmp_path: Path) -> None:
    result = command(plain, "--steps", 4, "-o", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "final states: SNR" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["forward"][""]["passed"] and report["trajectory"]["passed"]
    assert len(report["trajectory"]["states"]) == 4


def test_half_precision_is_judged_with_every_rounding(tmp_path: Path) -> None:
    path = build_narrow(tmp_path / "half", precision="fp16")
    report = validate(load_bundle(path), ["trajectory"], settings={"steps": 4})
    assert report.passed
    assert report.trajectory is not None
    assert "every rounding explicit" in report.trajectory.runner
    assert 30 < report.trajectory.states[-1].metrics.snr_db < 90


def test_a_gate_that_is_missed_fails(plain: Path) -> None:
    result = command(plain, "--level", "trajectory", "--steps", 4, "--fail-under", "snr=300", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["forward"] is None


def test_every_part_of_a_stitched_bundle_is_compared(stitched: Path) -> None:
    report = validate(load_bundle(stitched), settings={"steps": 4})
    assert report.passed
    assert set(report.forward) == set(load_bundle(stitched).networks)


def test_validation_leaves_the_bundle_as_it_was(tmp_path: Path) -> None:
    path = build_narrow(tmp_path / "half", precision="fp16")
    before = sorted(path.rglob("*"))
    validate(load_bundle(path), settings={"steps": 4})
    assert sorted(path.rglob("*")) == before
    load_bundle(path)


def test_a_bundle_of_ones_own_recipe_needs_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from dexport.exporter.recipes import find_recipe\n"
        "RECIPE = replace(find_recipe('dit-fashion'), name='mine')\n"
    )
    build_narrow(tmp_path / "out", str(tmp_path / "mine.py"))
    assert command(tmp_path / "out", "--level", "forward").exit_code == 2
    assert command(tmp_path / "out", "--level", "forward", "--recipe", tmp_path / "mine.py").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fail-under", "fid=3"], "there is no metric 'fid'"),
        (["--fail-under", "snr_db=3"], "did you mean snr"),
        (["--fail-under", "snr=a"], "is not NAME=NUMBER"),
        (["--fail-under", "snr=nan"], "is not NAME=NUMBER"),
        (["--fail-over", "snr=3"], "more is better"),
        (["--fail-over", "evaluation_l2=3", "--fail-over", "evaluation_l2=4"], "has a limit already"),
        (["--fail-over", "relative_l2=1"], "add --level forward"),
        (["--level", "distribution"], "give them with --reference"),
        (["--baseline", "absent.json"], "dexport baseline update"),
        (["--classes", "11"], "no class 11"),
        (["--classes", ""], "at least one image"),
        (["--steps", "2000"], "the schedule has 1000"),
        (["--checkpoint", "decoder=vae.pt"], "no network 'decoder'"),
    ],
)
def test_refusals(plain: Path, options: list[str], message: str) -> None:
    result = command(plain, "--level", "trajectory", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_levels_that_do_not_exist(plain: Path) -> None:
    with pytest.raises(UsageError, match="no level block"):
        validate(load_bundle(plain), ["block"])


def test_a_decoder_has_no_trajectory(tmp_path: Path) -> None:
    settings = {"block_out_channels": [32, 32], "layers_per_block": 1}
    dexport.build("sd-vae-decoder", tmp_path / "vae", latent=(8, 8), settings=settings, profile="ci", parity=False)
    assert command(tmp_path / "vae", "--level", "forward").exit_code == 0
    assert command(tmp_path / "vae", "--level", "trajectory").exit_code == 4
    result = command(tmp_path / "vae")
    assert result.exit_code == 0
    assert "not run: trajectory: the bundle has no program" in result.stdout
    assert set(load_bundle(tmp_path / "vae").manifest["validation"]["settings"]["levels"]) == {"op", "forward"}


def test_latents_are_compared_where_there_is_no_decoder(tmp_path: Path) -> None:
    settings = {"hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 5, "input_size": 8}
    dexport.build("dit-s-2", tmp_path / "dit", settings=settings, profile="ci", parity=False)
    result = command(tmp_path / "dit", "--level", "trajectory", "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "the bundle makes none, so the states were compared" in result.stdout
    refused = command(tmp_path / "dit", "--level", "trajectory", "--fail-under", "psnr=3")
    assert refused.exit_code == 2 and "psnr needs pictures" in refused.stderr


def test_a_limit_on_lpips_needs_its_weights(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dexport.validate.features.lpips.PACKAGE", "no_such_package")
    with pytest.raises(MachineError, match="no weights of LPIPS"):
        validate(load_bundle(plain), ["trajectory"], limits=parse_limits((), ("lpips=0.1",)))


def test_options_that_would_be_ignored_are_refused(plain: Path, tmp_path: Path) -> None:
    result = command(plain / "model.onnx", "--html", tmp_path / "x.html")
    assert result.exit_code == 2 and "fix: dexport compare " in result.stderr
    result = command(plain, "--reference", tmp_path)
    assert result.exit_code == 2 and "add --level distribution" in result.stderr
    result = command(plain, "--checkpoint", "a.pt", "--checkpoint", "b.pt")
    assert result.exit_code == 2 and "given twice" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scheme", "gate"), [("weight", "int8"), ("w8a8", "w8a8")])
def test_int8_has_gates_of_its_own(tmp_path: Path, scheme: str, gate: str) -> None:
    path = build_narrow(tmp_path / "out", int8=scheme)
    report = validate(load_bundle(path), settings={"steps": 4})
    assert load_bundle(path).network.manifest["precision"]["gate"] == gate
    assert report.trajectory is not None
    assert report.trajectory.gate_snr_db == DEFAULT_SNR[gate]
    assert report.passed


def test_a_recipe_of_ones_own_is_for_the_networks_built_from_it(plain: Path) -> None:
    mine = find_recipe("examples/my_backbone.py")
    networks = {
        name: Bundle(Path(), {"recipe": {"name": recipe}}) for name, recipe in (("", mine.name), ("decoder", "sd-vae"))
    }
    assert recipes_of(networks, mine) == {"": mine, "decoder": None}
    assert recipes_of(networks, None) == {"": None, "decoder": None}
    with pytest.raises(UsageError, match=f"recipe 'dit-fashion', and '{mine.name}' was given"):
        validate(load_bundle(plain), ["forward"], recipe=mine)


def test_pictures_that_are_not_finite_fail_and_the_other_levels_are_kept(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dexport.runtime.programs.ending.PixelShuffle.__call__",
        lambda _, z: np.full((len(z), 1, 32, 32), np.nan, np.float32),
    )
    report = validate(load_bundle(plain), ["forward", "trajectory"], settings={"steps": 2})
    assert not report.passed
    assert report.forward[""].passed
    (broken,) = (gate for gate in report.gates if gate.metric == "psnr")
    assert (broken.value, broken.verdict) == (None, "FAIL")
    assert "not finite" in broken.where
