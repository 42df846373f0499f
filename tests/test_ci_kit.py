"""The shell script of examples/ci: a clean run passes, a planted drift fails, and the reports are there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dexport.bundle import load_bundle
from dexport.validate.gates import parse_limits
from dexport.validate.report.baseline import update
from dexport.validate.validate import validate
from tests.commands import parsed
from tests.validate.faults import planted

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/ci/validate.sh"
LOOSE = parse_limits((), ("relative_l2=1",))
PYTHON = f"{sys.executable} -m dexport"


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DEXPORT": PYTHON,
        "RECIPE": "dit-fashion",
        "BUILD_OPTIONS": "--fp16 --profile ci",
        "VALIDATE_OPTIONS": "--level forward --fail-over relative_l2=1",
        **variables,
    }
    return subprocess.run(["sh", str(SCRIPT)], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def builder(folder: Path, bundle: Path) -> str:
    """In place of the command: its ``build`` gives a bundle that is there already."""
    file = folder / f"with-{bundle.name}.sh"
    file.write_text(
        f'if [ "$1" = build ]; then mkdir -p out/ci; rm -rf out/ci/bundle; cp -r {bundle} out/ci/bundle\n'
        f'else exec {PYTHON} "$@"; fi\n'
    )
    return f"sh {file}"


def test_a_clean_run_passes_and_a_drift_fails(plain: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(validate(load_bundle(plain), ["forward"], limits=LOOSE).to_json()))
    update(report, tmp_path / "ci/baseline.json")

    summary = tmp_path / "summary.md"
    passed = run(tmp_path, DEXPORT=builder(tmp_path, plain), GITHUB_STEP_SUMMARY=str(summary))
    assert passed.returncode == 0, passed.stderr
    assert summary.read_text().startswith("## ✅ dit-fashion: passed")

    shutil.rmtree(tmp_path / "out")
    failed = run(tmp_path, DEXPORT=builder(tmp_path, planted(plain, tmp_path / "drifted")))
    assert failed.returncode == 1, failed.stderr
    assert "fell behind the baseline" in (tmp_path / "out/ci/report.md").read_text()
    assert {path.suffix for path in (tmp_path / "out/ci").glob("report.*")} == {".json", ".md", ".html", ".xml"}


@pytest.mark.parametrize("asked", ["", "1"])
def test_every_command_that_it_runs_exists(tmp_path: Path, asked: str) -> None:
    (tmp_path / "note.sh").write_text('echo "$@" >>calls.txt\n')
    assert run(tmp_path, DEXPORT=f"sh {tmp_path / 'note.sh'}", UPDATE=asked).returncode == 0
    calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert [call[0] for call in calls] == ["build", "validate", "baseline"][: 3 if asked else 2]
    for call in calls:
        parsed(call)


def test_without_a_recipe_it_says_what_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, RECIPE="")
    assert done.returncode == 2
    assert "set RECIPE" in done.stderr


@pytest.mark.parametrize("step", ["Build, validate, compare with the baseline", "Comment on the pull request"])
def test_the_workflow_runs_the_script_and_posts_its_page(step: str) -> None:
    workflow = yaml.safe_load((ROOT / "examples/ci/github.yml").read_text())
    job = workflow["jobs"]["validate"]
    command = next(entry["run"] for entry in job["steps"] if entry.get("name") == step)
    assert ("validate.sh" in command) or ("$OUT/report.md" in command)
    script = SCRIPT.read_text()
    assert all(f"${{{name}" in script for name in job["env"])
