"""Stored reports, baselines and records that no validation wrote: refused by place, whatever is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from dexport.bundle import MANIFEST
from dexport.cli import main
from dexport.errors import InputError
from dexport.validate.gates import METRICS
from dexport.validate.report import schema as report_schema
from dexport.validate.report.baseline import TOLERANCES, read_baseline
from dexport.validate.report.document import read_report, summary
from dexport.verdict import Loss
from tools.fuzz_documents import REPORT

Document = dict[str, Any]
KEPT = ("dexport", "date", "verdict", "loss", "network", "settings", "metrics", "files", "tools")
FULL: Document = json.loads(REPORT.read_text())
BASELINE = {"kind": "dexport baseline", "schema": 2, **{name: summary(FULL)[name] for name in KEPT}}


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr


def put(*path: str | int, value: Any) -> Callable[[Document], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def dropped(*path: str | int) -> Callable[[Document], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def copy_with(document: Document, change: Callable[[Document], None]) -> Document:
    changed = json.loads(json.dumps(document))
    change(changed)
    return changed


NAN = float("nan")
WRONG: dict[str, tuple[Callable[[Document], None], str]] = {
    "an unknown verdict": (put("verdict", value="fine"), "$.verdict"),
    "a verdict that its gates contradict": (put("verdict", value="passed"), "its gates say failed"),
    "passed against its verdict": (put("passed", value=True), "$.passed"),
    "an unknown gate verdict": (put("gates", 0, "verdict", value="ok"), "$.gates[0].verdict"),
    "an unknown gate": (put("gates", 0, "metric", value="beauty"), "$.gates[0].metric"),
    "an unknown level": (put("gates", 0, "level", value="world"), "$.gates[0].level"),
    "a direction that is none": (put("gates", 0, "better", value="left"), "$.gates[0].better"),
    "a figure as text": (put("gates", 0, "value", value="1"), "$.gates[0].value"),
    "not a number": (put("gates", 0, "value", value=NAN), "$.gates[0].value"),
    "infinite": (put("trajectory", "gate_snr_db", value=float("inf")), "$.trajectory.gate_snr_db"),
    "an integer beyond floats": (put("gates", 0, "limit", value=10**400), "$.gates[0].limit"),
    "decibels beyond reason": (put("trajectory", "gate_snr_db", value=-1e9), "$.trajectory.gate_snr_db"),
    "no states": (put("trajectory", "states", value=[]), "$.trajectory.states"),
    "a negative error": (put("trajectory", "states", 0, "relative_l2", value=-1.0), "$.trajectory.states[0]"),
    "one SSIM too few": (put("trajectory", "ssim", value=[1.0]), "$.trajectory.ssim"),
    "one LPIPS too many": (put("trajectory", "lpips", value=[0.0] * 9), "$.trajectory.lpips"),
    "one edge too few": (dropped("distribution", "histograms", 0, "edges", 0), "histograms[0].edges"),
    "no interval": (dropped("distribution", "delta", "low"), "$.distribution.delta"),
    "a status of a check": (put("forward", "", "checks", 0, "status", value="great"), "checks[0].status"),
    "an unknown metric": (put("metrics", "a/beauty", value={"value": 1.0}), "'a/beauty'"),
    "a metric without a value": (put("metrics", "a/ssim", value={}), "$.metrics"),
    "a date that is none": (put("date", value="\x1b[2J"), "$.date"),
    "text in place of a section": (put("environment", value="linux"), "$.environment"),
    "nodes of no number": (put("precision_map", 0, "nodes", value={"float32": None}), "$.precision_map[0].nodes"),
    "a tool of three versions": (put("baseline", "tools", value={"torch": ["1", "2", "3"]}), "$.baseline.tools"),
    "an unknown change": (put("baseline", "changes", 0, "verdict", value="odd"), "$.baseline.changes[0].verdict"),
    "a block without its path": (dropped("blocks", 0, "path"), "$.blocks[0]"),
    "nested beyond reason": (put("network", "network", "config", "a", value=json.loads("[" * 90 + "]" * 90)), "nested"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_reports_are_refused_by_place(name: str, tmp_path: Path) -> None:
    change, place = WRONG[name]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(copy_with(FULL, change)))
    for arguments in (("report", path), ("baseline", "update", path, "-o", tmp_path / "new.json")):
        code, message = run(*arguments)
        assert code == 4, message
        assert place in message
        assert str(path) in message
        assert message.count("error: ") == 1


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (put("metrics", "a/beauty", value={"value": 1.0}), "'a/beauty'"),
        (put("metrics", "size/onnx_bytes", value={"value": "big"}), "$.metrics"),
        (put("metrics", "size/onnx_bytes", value={"value": NAN}), "$.metrics"),
        (put("metrics", "size/onnx_bytes", value=None), "$.metrics"),
        (put("metrics", value=[]), "$.metrics"),
        (put("settings", value={}), "$.settings"),
        (put("settings", "levels", value=["world"]), "$.settings.levels[0]"),
        (put("settings", "distribution", value={"evaluator": 1}), "$.settings.distribution"),
        (put("files", value=7), "$.files"),
        (put("tools", "torch", value=7), "$.tools"),
        (dropped("tools"), "lacks tools"),
    ],
)
def test_damaged_baselines_are_refused_by_place(change: Callable[[Document], None], place: str, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(copy_with(BASELINE, change)))
    code, message = run("report", REPORT, "--baseline", path)
    assert code == 4, message
    assert place in message


@pytest.mark.parametrize(
    "record",
    [True, [], {}, "passed", {"verdict": "passed"}, {**summary(FULL), "gates": [1]}, {**summary(FULL), "loss": None}],
)
def test_damaged_records_of_a_bundle_are_refused(record: Any, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    manifest = {"schema": 2, "status": "passed", "files": {}, "validation": record}
    (tmp_path / "bundle" / MANIFEST).write_text(json.dumps(manifest))
    code, message = run("baseline", "update", tmp_path / "bundle", "-o", tmp_path / "new.json")
    assert code == 4, message
    assert "validation" in message
    assert not (tmp_path / "new.json").exists()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """A stored report of this schema stays readable, with whatever else is in it."""
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(BASELINE | {"note": "mine"}))
    assert read_baseline(path).content["note"] == "mine"
    assert read_report(REPORT) == FULL
    assert run("report", REPORT)[0] == 1


@pytest.mark.parametrize(
    "path", [("metrics", "trajectory/final/relative_l2"), ("distribution", "delta"), ("gates", 0), ("trajectory",), ()]
)
def test_fields_that_nobody_knows_are_left_out(path: tuple[str | int, ...], tmp_path: Path) -> None:
    gates = [{**gate, "verdict": "pass"} for gate in FULL["gates"]]
    report = copy_with(FULL | {"gates": gates, "verdict": "passed", "passed": True, "baseline": None}, lambda _: None)
    holder = report
    for key in path:
        holder = holder[key]  # type: ignore[index]
    holder |= {"metric" if path[:1] == ("distribution",) else "note": ["mine"], "": "x", "figure": {}}
    stored, new = tmp_path / "report.json", tmp_path / "new.json"
    stored.write_text(json.dumps(report))
    assert run("baseline", "update", stored, "-o", new)[0] == 0
    assert "mine" not in new.read_text()
    views = [f"--{view}={tmp_path / view}" for view in ("html", "junit", "markdown")]
    assert run("report", stored, "--baseline", new, *views)[0] == 0


def test_names_are_those_of_the_tables() -> None:
    assert set(get_args(report_schema.Measured)) == set(TOLERANCES)
    assert {metric.level for metric in METRICS.values()} - {"bench"} == set(get_args(report_schema.Level))


@pytest.mark.parametrize("value", [10**400, -1.0, NAN, float("inf"), True, "1", None])
def test_a_loss_that_is_no_figure_is_not_known(value: Any) -> None:
    loss = Loss.of_json({"relative_l2": value})
    assert (loss.relative_l2, loss.snr_db, str(loss)) == (None, None, "")


@pytest.mark.parametrize("content", ["", "{", "\x00", "[" * 100_000, "nope", '{"kind": 1e999}'])
def test_files_that_are_no_json(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    for read in (read_report, read_baseline):
        with pytest.raises(InputError):
            read(path)
