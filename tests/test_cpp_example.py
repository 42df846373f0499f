"""The C++ example builds with what is here, and computes what Python computes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import dexport
from tests.bundles import trained_inputs
from tests.golden import assert_golden

SOURCE = Path(__file__).parent.parent / "examples" / "cpp"
CMAKE = shutil.which("cmake")
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
LIBRARIES = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))

pytestmark = [
    pytest.mark.skipif(CMAKE is None or COMPILER is None, reason="cmake and a C++ compiler are needed"),
    pytest.mark.skipif(not LIBRARIES, reason="this onnxruntime has no shared library"),
]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("cpp")
    for command in (
        ["-S", SOURCE, "-B", build, f"-DONNXRUNTIME_LIBRARY={LIBRARIES[0]}", "-DCMAKE_CXX_FLAGS=-Werror"],
        ["--build", build, "--target", "ort_step"],
    ):
        done = subprocess.run([str(CMAKE), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "ort_step"


@pytest.fixture
def run(program: Path, tmp_path: Path) -> Run:
    for name, array in trained_inputs().items():
        array.tofile(tmp_path / f"{name}.raw")
    return lambda *arguments: subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_it_computes_what_python_computes(run: Run, trained: Path, tmp_path: Path) -> None:
    done = run(trained, tmp_path, "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"ONNX Runtime {onnxruntime.__version__}\nout: {3 * 8 * 16 * 16} values\n"
    expected = dexport.load(trained)(**trained_inputs())["out"]
    received = np.fromfile(tmp_path / "out.raw", np.float32).reshape(expected.shape)
    assert_golden(received, expected)


def test_what_is_wrong_is_told(run: Run, trained: Path, tmp_path: Path) -> None:
    for arguments, code, message in [
        ((), 2, "usage: ort_step BUNDLE FOLDER BATCH"),
        ((trained, tmp_path, "0"), 1, "0 is no batch"),
        ((trained, tmp_path, "2"), 1, "x.raw has 12288 bytes, expected 8192"),
        ((trained, tmp_path / "missing", "3"), 1, "x.raw cannot be read"),
        ((tmp_path, tmp_path, "3"), 1, "ONNX Runtime: "),
    ]:
        done = run(*arguments)
        assert done.returncode == code
        assert message in done.stderr
    assert not (tmp_path / "out.raw").exists()
