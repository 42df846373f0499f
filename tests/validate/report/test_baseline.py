"""Baselines: what is written, what counts as drift, and what cannot be compared; the record in the manifest."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dexport import bundle as bundles
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.validate.report.baseline import Baseline, changes, read_baseline, update
from tests.validate.faults import planted


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def validated(bundle: Path, *options: object) -> Result:
    return run("validate", bundle, "--level", "forward", "--level", "trajectory", "--steps", 3, *options)


@pytest.fixture(scope="module")
def bundle(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated bundle, whose manifest says so."""
    path = tmp_path_factory.mktemp("validated") / "bundle"
    shutil.copytree(plain, path)
    assert validated(path).exit_code == 0
    return path


@pytest.fixture
def baseline(bundle: Path, tmp_path: Path) -> Path:
    result = run("baseline", "update", bundle, "-o", tmp_path / "ci" / "baseline.json")
    assert result.exit_code == 0, result.output
    return tmp_path / "ci" / "baseline.json"


def test_the_manifest_records_the_validation(bundle: Path) -> None:
    record = load_bundle(bundle).manifest["validation"]
    assert record["verdict"] == "passed"
    assert {gate["metric"] for gate in record["gates"]} == {"relative_l2", "snr"}
    assert record["settings"]["steps"] == 3
    assert "passed on" in run("info", bundle).stdout


def test_a_killed_record_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_bundle(bundle).manifest

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bundles.change_manifest(load_bundle(bundle), validation={"verdict": "passed"})
    assert load_bundle(bundle).manifest == before
    remains = bundle / ".manifest.json.partial-0123abcd"  # of a kill that nothing cleans up after
    remains.write_text("half")
    assert load_bundle(bundle).manifest == before
    monkeypatch.undo()
    bundles.change_manifest(load_bundle(bundle), **before)
    assert not remains.exists()


def test_a_baseline_is_small_and_the_same_when_it_is_written_again(bundle: Path, baseline: Path) -> None:
    text = baseline.read_text()
    content = json.loads(text)
    assert len(text) < 5000
    assert list(content["metrics"]) == sorted(content["metrics"])
    assert set(content["files"]) == {"model.onnx", "model.onnx.data"}
    assert content["tools"]["torch"]
    run("baseline", "update", bundle, "-o", baseline)
    assert baseline.read_text() == text


def test_nothing_drifted(bundle: Path, baseline: Path, tmp_path: Path) -> None:
    result = validated(bundle, "--baseline", baseline, "-o", tmp_path / "r.json", "--markdown", tmp_path / "r.md")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert {change["verdict"] for change in report["baseline"]["changes"]} == {"same"}
    assert (report["baseline"]["files"], report["baseline"]["tools"]) == ([], {})
    assert "no figure fell behind the baseline" in (tmp_path / "r.md").read_text()
    assert run("baseline", "update", tmp_path / "r.json", "-o", tmp_path / "again.json").exit_code == 0
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == json.loads(baseline.read_text())["metrics"]


def test_drift_within_the_gates_fails(bundle: Path, baseline: Path, tmp_path: Path) -> None:
    drifted = planted(bundle, tmp_path / "drifted", factor=1.01)
    loose = ("--fail-over", "relative_l2=1", "--fail-under", "snr=1")
    assert validated(drifted, *loose).exit_code == 0
    result = validated(drifted, *loose, "--baseline", baseline, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    worse = {change["metric"] for change in report["baseline"]["changes"] if change["verdict"] == "worse"}
    assert {"forward/as shipped/relative_l2", "trajectory/final/relative_l2"} <= worse
    assert report["baseline"]["files"] == ["model.onnx.data"] or "model.onnx.data" in report["baseline"]["files"]
    assert "worse than the baseline: forward/as shipped/relative_l2" in validated(
        drifted, *loose, "--baseline", baseline
    ).stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4"], "steps: 3 in the baseline, 4 here"),
        (["--seed", "1"], "seed: 0 in the baseline, 1 here"),
        (["--level", "op"], "levels: ['forward', 'trajectory'] in the baseline"),
    ],
)
def test_other_settings_are_refused(bundle: Path, baseline: Path, options: list[str], message: str) -> None:
    result = validated(bundle, "--baseline", baseline, *options)
    assert result.exit_code == 4
    assert message in " ".join(result.stderr.split())
    assert "dexport baseline update" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "has baseline schema 3"),
        ({"kind": "something"}, "is not a baseline"),
        ({"metrics": None}, "lacks metrics"),
        ({"network": {"network": {"recipe": "dit-xl-2"}}}, "recipe: 'dit-xl-2' in the baseline, 'dit-fashion' here"),
    ],
)
def test_other_baselines_are_refused(bundle: Path, baseline: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads(baseline.read_text()) | change
    baseline.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    result = validated(bundle, "--baseline", baseline)
    assert result.exit_code == 4
    assert message in " ".join(result.stderr.split())


def test_files_that_are_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_baseline(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_baseline(tmp_path / "bad.json")


def test_what_cannot_become_a_baseline(plain: Path, bundle: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    shutil.copytree(bundle, fresh)
    bundles.change_manifest(load_bundle(fresh), validation=None)
    with pytest.raises(UsageError, match="records no validation"):
        update(fresh, tmp_path / "b.json")
    with pytest.raises(UsageError, match=r"not a \.json file"):
        update(bundle, tmp_path / "b.txt")
    assert validated(plain, "--no-record", "--fail-under", "snr=300", "-o", tmp_path / "failed.json").exit_code == 1
    with pytest.raises(InputError, match=r"did not pass \(snr\)"):
        update(tmp_path / "failed.json", tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def change_of(name: str, before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    content = {"metrics": {} if before is None else {name: before}}
    (change,) = changes(Baseline(Path("b.json"), content), {"metrics": {} if now is None else {name: now}})
    return change.verdict


@pytest.mark.parametrize(
    ("name", "before", "now", "verdict"),
    [
        ("forward/rounded/relative_l2", 4e-4, 7.9e-4, "same"),
        ("forward/rounded/relative_l2", 4e-4, 8.1e-4, "worse"),
        ("forward/rounded/relative_l2", 4e-4, 1.9e-4, "better"),
        ("forward/as shipped/relative_l2", 1e-7, 1.9e-6, "same"),
        ("forward/as shipped/relative_l2", 0.0, 3e-6, "worse"),
        ("forward/as shipped/relative_l2", 9e-7, 1e-7, "same"),
        ("forward/as shipped/relative_l2", 1e-4, None, "worse"),
        ("forward/as shipped/relative_l2", None, 1e-4, "better"),
        ("trajectory/pictures/psnr_db", 50.0, 47.5, "same"),
        ("trajectory/pictures/psnr_db", 50.0, 46.5, "worse"),
        ("trajectory/pictures/psnr_db", 50.0, 53.5, "better"),
        ("trajectory/pictures/ssim", 0.99, 0.98, "worse"),
        ("size/onnx_bytes", 1000, 1019, "same"),
        ("size/onnx_bytes", 1000, 1021, "worse"),
    ],
)
def test_tolerances(name: str, before: float | None, now: float | None, verdict: str) -> None:
    assert change_of(name, {"value": before}, {"value": now}) == verdict


def test_estimates_move_by_the_margins_of_both() -> None:
    name = "distribution/inception/delta"
    before = {"value": 0.1, "margin": 0.2}
    assert change_of(name, before, {"value": 0.35, "margin": 0.1}) == "same"
    assert change_of(name, before, {"value": 0.45, "margin": 0.1}) == "worse"
    assert change_of(name, before, {"value": -0.25, "margin": 0.1}) == "better"
    assert change_of(name, before, None) == "worse"
    assert change_of(name, None, before) == "same"


@pytest.mark.parametrize(
    "options",
    [("--steps", 2), ("--seed", 3), ("--classes", "1,0"), ("--cfg", 1.5, "--steps", 4), ("--sampler", "ddim")],
)
def test_the_fix_of_other_settings_does_not_loop(bundle: Path, baseline: Path, options: tuple[object, ...]) -> None:
    before = baseline.read_bytes()
    refused = validated(bundle, *options, "--no-record", "--baseline", baseline)
    assert refused.exit_code == InputError.exit_code
    command = shlex.split(refused.stderr.split("fix: `")[1].split("`")[0])
    assert command[:2] == ["dexport", "validate"]
    mended = run(*command[1:], "--no-record")
    assert mended.exit_code == 0, mended.output
    assert baseline.read_bytes() == before


def test_the_baseline_of_another_network_gets_one_of_its_own(baseline: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(trained, path)
    refused = validated(path, "--baseline", baseline)
    assert refused.exit_code == InputError.exit_code
    assert "NEW_REPORT.json" in refused.stderr and str(baseline) not in refused.stderr.split("fix: ")[1]
