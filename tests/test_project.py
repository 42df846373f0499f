"""The project's own promises: import directions, the README's commands, no forbidden dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import dexport

ROOT = Path(__file__).parent.parent


def test_imports_point_one_way() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text()
    block = (ROOT / "README.md").read_text().split("```")[1]
    commands = re.findall(r"^make \w+", block, flags=re.MULTILINE)
    assert commands == ["make demo", "make test"]
    assert all(re.search(f"^{command}$", script, flags=re.MULTILINE) for command in [*commands, "make test-rounding"])


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["rtx"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["docs"],
    ]
    pinned = {
        _normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {_normal(re.split(r"[><=\[]", name)[0]) for name in wanted} <= pinned


def test_every_optional_module_names_an_extra_that_exists() -> None:
    from dexport.optional import EXTRA_OF

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRA_OF.values()) <= set(extras)


def test_the_example_recipe_builds(tmp_path: Path) -> None:
    result = dexport.build(str(ROOT / "examples/my_dit.py"), tmp_path / "out", precision="fp16")
    assert result.verdict is not None
    assert result.verdict.passed
    assert result.bundle.manifest["name"] == "my-dit"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_importing_dexport_and_its_command_line_imports_no_framework() -> None:
    heavy = (
        "torch",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "numpy",
        "rich",
        "msgspec",
        "tensorrt",
        "tensorrt_rtx",
    )
    script = f"import sys, dexport, dexport.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
