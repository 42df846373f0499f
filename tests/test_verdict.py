"""Four states, what was lost, and every place that says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import dexport
from dexport.bundle import Bundle, change_manifest, load_bundle
from dexport.cli import main
from dexport.errors import BundleWarning, GateError, InputError
from dexport.exporter.build import exit_code
from dexport.exporter.gates import GATES, gates_for, gates_of
from dexport.validate.gates import Gate
from dexport.validate.report.baseline import update
from dexport.verdict import (
    FAILED,
    LOSSY,
    NOT_VERIFIED,
    PASSED,
    SHIPPABLE_L2,
    SHIPPABLE_SNR_DB,
    Loss,
    caveats,
    relative_l2_of,
    status_of,
    worst_status,
)
from tests.bundles import NARROW

COARSE = {"*": "ternary"}
QUICK = ("--steps", "2", "--classes", "0")


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is within the gate of its scheme, and lossy; nobody accepted that."""
    path = tmp_path_factory.mktemp("ternary") / "bundle"
    options = {"settings": NARROW, "profile": "ci", "calibration_images": 4, "precision_map": COARSE}
    result = dexport.build("dit-fashion", path, **options)
    assert result.status == LOSSY and exit_code(result) == GateError.exit_code
    assert result.verdict is not None and not result.verdict.passed
    return path


@pytest.fixture(scope="module")
def validated(ternary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, in every form beside it."""
    report = tmp_path_factory.mktemp("report") / "r.json"
    views = [f"--{kind}={report.with_suffix(f'.{kind}')}" for kind in ("junit", "markdown", "html")]
    result = run("validate", ternary, "--level", "forward", "--level", "trajectory", *QUICK, "-o", report, *views)
    assert result.exit_code == GateError.exit_code, result.output
    assert "LOSSY, not accepted (--accept-loss): predictions move by" in result.stdout
    assert "more is lost than is fit to ship" in result.stderr
    return report


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("within", "loss", "status"),
    [
        (True, Loss(), PASSED),
        (True, Loss(0.0), PASSED),
        (True, Loss(SHIPPABLE_L2), PASSED),
        (True, Loss(1.01 * SHIPPABLE_L2), LOSSY),
        (True, Loss(1e-6, latents_snr_db=SHIPPABLE_SNR_DB), PASSED),
        (True, Loss(1e-6, latents_snr_db=SHIPPABLE_SNR_DB - 0.1), LOSSY),
        (True, Loss(math.inf), LOSSY),
        (False, Loss(1e-6), FAILED),
        (False, Loss(0.5), FAILED),
    ],
)
def test_states(within: bool, loss: Loss, status: str) -> None:
    assert status_of(within, loss) == status


def test_the_worst_part_decides() -> None:
    assert worst_status([PASSED, NOT_VERIFIED]) == NOT_VERIFIED
    assert worst_status([LOSSY, NOT_VERIFIED, PASSED]) == LOSSY
    assert worst_status([LOSSY, FAILED, NOT_VERIFIED]) == FAILED
    assert worst_status([FAILED, "splendid"]) == "splendid"
    whole = Loss(1e-3, 40.0, 30.0).worst([Loss(2e-1), Loss(1e-6, 7.1, None)])
    assert whole == Loss(2e-1, 7.1, 30.0)


def test_a_loss_survives_json_and_anything_else_is_not_known() -> None:
    loss = Loss(0.25, 7.1, 9.9)
    assert Loss.of_json(json.loads(json.dumps(loss.to_json()))) == loss
    assert Loss.of_json(Loss(math.inf, -math.inf).to_json()) == Loss()
    for text in ("25", "12.0 dB", "7.1 dB", "9.9 dB"):
        assert text in str(loss)
    for document in (None, "0.1", [], {"relative_l2": "\x1b]0;", "psnr_db": True, "latents_snr_db": math.nan}):
        assert Loss.of_json(document) == Loss()


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"status": PASSED, "weights": {"random": False}}, ()),
        ({"status": PASSED, "weights": {"random": True}}, ("RANDOM",)),
        ({"status": FAILED, "weights": {"random": True}}, ("RANDOM", "FAILED")),
        ({"status": LOSSY, "loss": Loss(0.25).to_json()}, ("lossy: predictions move by 25 %",)),
        ({"status": NOT_VERIFIED}, ("not verified",)),
        ({"status": PASSED, "validation": {"verdict": "failed"}}, ("found it failed",)),
        ({"status": PASSED, "validation": {"verdict": LOSSY, "loss": {"latents_snr_db": 7.1}}}, ("SNR of 7.1 dB",)),
        ({"status": "\x1b[31mpassed"}, ("no status that is known",)),
        ({}, ("no status that is known",)),
    ],
)
def test_caveats(manifest: dict[str, Any], words: tuple[str, ...]) -> None:
    found = list(caveats(manifest))
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True):
        assert word in text and text.isprintable()


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("snr_db", [10.0, 25.0, 26.5, 40.0])
def test_a_budget_judges_whatever_schemes_were_chosen(name: str, snr_db: float) -> None:
    gates = gates_for(name, {}, snr_db)
    assert gates.relative_l2 == pytest.approx(10 ** (-snr_db / 20))
    assert gates.snr_db == snr_db
    assert gates.block_l2 == GATES[name].relative_l2
    tightest = [row.distance_share for row in GATES.values() if row.relative_l2 >= gates.relative_l2]
    assert gates.distance_share == min(tightest)
    recorded = {"name": "fp32", "gate": name, "budget": {"asked": f"snr>={snr_db}", "asked_snr_db": snr_db}}
    assert gates_of(recorded, {}) == gates


def test_gates_without_a_budget_are_those_of_the_table_or_of_the_recipe() -> None:
    assert gates_for("ternary", {}).relative_l2 == GATES["ternary"].relative_l2
    assert gates_for("ternary", {"ternary": 0.1}).relative_l2 == 0.1
    assert gates_of({"name": "fp16"}, {}).snr_db == GATES["fp16"].snr_db
    assert gates_of({"name": "fp32", "gate": "int4", "budget": {"asked_snr_db": None}}, {}).snr_db == 10
    assert gates_for("fp32", {}, 200.0).relative_l2 == GATES["fp32"].relative_l2
    assert relative_l2_of(SHIPPABLE_SNR_DB) == SHIPPABLE_L2
    with pytest.raises(InputError, match="no gate 'fp2'"):
        gates_for("fp2", {})
    with pytest.raises(InputError, match="no SNR"):
        gates_of({"name": "fp32", "budget": {"asked_snr_db": "25"}}, {})


@pytest.mark.parametrize(
    ("metric", "value", "limit", "verdict"),
    [
        ("relative_l2", 0.25, 0.5, "lossy"),
        ("relative_l2", 0.05, 0.5, "pass"),
        ("relative_l2", 0.6, 0.5, "FAIL"),
        ("snr", 7.1, 5.0, "lossy"),
        ("snr", 25.5, 5.0, "pass"),
        ("snr", 4.9, 5.0, "FAIL"),
        ("block_l2", 0.3, 0.5, "pass"),
    ],
)
def test_a_gate_says_lossy(metric: str, value: float, limit: float, verdict: str) -> None:
    assert Gate(metric, value, limit).verdict == verdict


def test_the_manifest_says_what_was_lost(ternary: Path) -> None:
    bundle = load_bundle(ternary)
    assert (bundle.status, bundle.failed, bundle.acceptable) == (LOSSY, False, False)
    assert bundle.manifest["accepted_loss"] is False
    assert bundle.loss.relative_l2 is not None and SHIPPABLE_L2 < bundle.loss.relative_l2 < 0.5
    assert bundle.network.entry()["parity"]["status"] == LOSSY
    assert bundle.network.entry()["parity"]["passed"] is False
    assert json.loads((ternary / "reports/parity.json").read_text())["status"] == LOSSY
    page = (ternary / "reports/parity.md").read_text()
    assert "**LOSSY**" in page and "| lossy |" in page and "Lost: predictions move by" in page
    shown = run("info", ternary).stdout
    assert "lossy" in shown and "LOSSY, not accepted: predictions move by" in shown


def test_reports_say_what_was_lost(ternary: Path, validated: Path) -> None:
    report = json.loads(validated.read_text())
    assert (report["verdict"], report["passed"], report["loss"]["accepted"]) == (LOSSY, False, False)
    assert report["loss"]["relative_l2"] > SHIPPABLE_L2 and report["loss"]["latents_snr_db"] is not None
    assert LOSSY in {gate["verdict"] for gate in report["gates"]}
    for kind in ("markdown", "html"):
        page = validated.with_suffix(f".{kind}").read_text()
        assert "lossy" in page and "predictions move by" in page and "not accepted" in page
    root = ElementTree.parse(validated.with_suffix(".junit")).getroot()
    kinds = {failure.get("type") for failure in root.iter("failure")}
    assert kinds == {LOSSY} and root.get("name", "").endswith(": lossy")
    record = load_bundle(ternary).manifest["validation"]
    assert (record["verdict"], record["loss"]) == (LOSSY, report["loss"])
    assert "lossy on" in run("info", ternary).stdout
    assert run("report", validated).exit_code == GateError.exit_code


def test_a_baseline_of_a_loss_needs_its_acceptance(validated: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nobody accepted") as caught:
        update(validated, tmp_path / "base.json")
    assert "--accept-loss" in caught.value.hint
    report = json.loads(validated.read_text())
    report["loss"]["accepted"] = True
    (tmp_path / "r.json").write_text(json.dumps(report))
    content = update(tmp_path / "r.json", tmp_path / "base.json").content
    assert (content["verdict"], content["loss"]["accepted"]) == (LOSSY, True)
    assert run("report", tmp_path / "r.json", "--junit", tmp_path / "r.xml").exit_code == 0
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert not list(root.iter("failure"))
    assert any("(lossy, accepted)" in case.get("name", "") for case in root.iter("testcase"))


def test_an_accepted_loss_exits_with_0_and_is_recorded(ternary: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(COARSE))
    options = ("--quantize", f"map={tmp_path / 'map.json'}", "--calibration-images", 4)
    result = run("quantize", ternary, *options, "-o", tmp_path / "out", "--accept-loss")
    assert result.exit_code == 0, result.output
    assert "LOSSY, accepted: predictions move by" in result.stdout
    bundle = load_bundle(tmp_path / "out")
    assert (bundle.status, bundle.acceptable, bundle.manifest["accepted_loss"]) == (LOSSY, True, True)
    assert run("validate", bundle.path, "--level", "forward", "--no-record").exit_code == 0
    assert run("validate", ternary, "--level", "forward", "--no-record").exit_code == GateError.exit_code
    assert run("validate", ternary, "--level", "forward", "--no-record", "--accept-loss").exit_code == 0


def test_who_runs_a_bundle_is_told(ternary: Path, tmp_path: Path) -> None:
    with pytest.warns(BundleWarning) as caught:
        dexport.load(ternary)
    said = " ".join(str(warning.message) for warning in caught)
    assert "RANDOM" in said and "lossy: predictions move by" in said
    assert all(warning.filename == __file__ for warning in caught)
    sampled = run("sample", ternary, "-o", tmp_path / "s.png", *QUICK, "--json")
    assert sampled.exit_code == 0, sampled.output
    assert "RANDOM" in sampled.stderr and "lossy: predictions move by" in sampled.stderr
    assert "lossy" in " ".join(json.loads(sampled.stdout)["caveats"])


@pytest.mark.parametrize(
    ("changed", "word"), [({"status": FAILED}, "FAILED"), ({"status": NOT_VERIFIED}, "not verified"), ({}, "RANDOM")]
)
def test_the_python_functions_tell_every_kind(plain: Path, changed: dict[str, Any], word: str, tmp_path: Path) -> None:
    bundle = load_bundle(plain)
    assert any(word in text for text in Bundle(plain, {**bundle.manifest, **changed}).caveats)
    with pytest.warns(BundleWarning, match="not verified"):
        result = dexport.build("dit-fashion", tmp_path / "out", settings=NARROW, profile="ci", parity=False)
    assert result.caveats == result.bundle.caveats != ()
    change_manifest(result.bundle, **changed)
    with pytest.warns(BundleWarning, match=word):
        dexport.load(tmp_path / "out")


def test_what_is_ternary_by_construction_loses_nothing(tmp_path: Path) -> None:
    settings = {"dim": 32, "n_layers": 1, "n_heads": 2}
    result = dexport.build("terdit-600m", tmp_path / "out", settings=settings, latent=(8, 8), profile="ci")
    assert result.bundle.network.manifest["ternary"]["exact"] is True
    assert (result.status, exit_code(result)) == (PASSED, 0)
