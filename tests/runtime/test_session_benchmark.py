"""benchmarks/gpu/session.py with sessions that run on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks.gpu import session as benchmark
from dexport.contract import Graph, from_json
from dexport.errors import MachineError
from tests.runtime.fake_gpu import FakeDriver, FakeTensorRt, manifest, write_bundle


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REPEATS", 3)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    status = benchmark.main([str(write_bundle(folder / "bundle").path), *options])
    return status, json.loads((folder / "session.json").read_text())


def test_report(tmp_path: Path, trt: FakeTensorRt, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    status, report = run(tmp_path, monkeypatch)
    assert status == 0
    assert (report["device"], report["target"], report["bundle"]) == ("Pretended GPU", "sm89", "small")
    plain, graphs, onnx = report["results"].values()
    assert plain["runner"].endswith("no CUDA graph")
    assert graphs["runner"].endswith("captured CUDA graphs")
    assert list(plain["batches"]) == list(graphs["batches"]) == ["1", "2", "8"]
    assert all(entry["error"] == 0 and entry["seconds"] > 0 for entry in graphs["batches"].values())
    assert "CUDAExecutionProvider" in onnx["not_run"]
    assert driver.clean


def test_batches_can_be_chosen(tmp_path: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    _, report = run(tmp_path, monkeypatch, "--batch", "3")
    assert list(report["results"]["tensorrt"]["batches"]) == ["3"]


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_way_that_computes_something_else_fails(
    tmp_path: Path,
    trt: FakeTensorRt,  # noqa: ARG001
    wrong: float,
) -> None:
    class Other(benchmark.TensorRtSession):
        def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            return {name: value + np.float32(wrong) for name, value in super().__call__(**inputs).items()}

    network = write_bundle(tmp_path / "bundle").network
    first, second, _ = benchmark.WAYS
    report = benchmark.compare(network, [2], {first: benchmark.TensorRtSession, second: Other})
    assert not report["correct"]
    report = benchmark.compare(network, [2], {first: Other})
    assert report["correct"] == np.isfinite(wrong)


def test_a_reference_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise MachineError("not here")

    with pytest.raises(MachineError, match="not here"):
        benchmark.compare(write_bundle(tmp_path / "bundle").network, [1], {"tensorrt": broken})


def test_example_inputs_fit_the_manifest() -> None:
    io = manifest()["io"]
    io["inputs"][1]["range"] = [0, 9]
    feed = benchmark.example_inputs(from_json(Graph, io, "it"), 64)
    assert {name: (array.dtype.name, array.shape) for name, array in feed.items()} == {
        "x": ("float32", (64, 4)),
        "y": ("int64", (64,)),
        "scale": ("float32", ()),
    }
    assert set(feed["y"]) == set(range(10))


def test_without_a_gpu_it_says_so(
    tmp_path: Path,
    driver: FakeDriver,
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver.devices = 0
    with pytest.raises(SystemExit) as exit_:
        benchmark.main([str(tmp_path)])
    assert exit_.value.code == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err
