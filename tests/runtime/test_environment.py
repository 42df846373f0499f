"""Sampling in an environment that holds the runtime's few packages and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dexport

NEEDED = ("click", "msgspec", "numpy", "onnxruntime", "pillow", "rich")


def with_requirements(name: str, seen: set[str]) -> None:
    """Collect a distribution and everything that it requires, extras left out."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return
    seen.add(name)
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            with_requirements(requirement.name, seen)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that shares the installed files of the needed packages."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dexport").symlink_to(Path(dexport.__file__).parent)
    names: set[str] = set()
    for needed in NEEDED:
        with_requirements(needed, names)
    for name in names:
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return folder / "bin" / "python"


def test_the_environment_has_no_torch_and_no_onnx(python: Path) -> None:
    for name in ("torch", "onnx", "onnx_ir"):
        done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        assert "ModuleNotFoundError" in done.stderr


def test_it_samples_a_bundle(python: Path, stitched: Path, tmp_path: Path) -> None:
    command = [python, "-m", "dexport", "sample", stitched, "-o", tmp_path / "out.png", "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 images in ")
    here = [sys.executable, *command[1:6], tmp_path / "here.png", *command[7:]]
    subprocess.run(here, check=True, capture_output=True)
    for picture in (tmp_path / "here-images").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "out-images" / picture.name).read_bytes()


def test_it_describes_a_bundle(python: Path, plain: Path) -> None:
    done = subprocess.run([python, "-m", "dexport", "info", plain], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hashes verified" in done.stdout


def test_it_says_what_building_needs(python: Path, tmp_path: Path) -> None:
    command = [python, "-m", "dexport", "build", "dit-s-2", "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "pip install dexport" in done.stderr
    assert "Traceback" not in done.stderr
