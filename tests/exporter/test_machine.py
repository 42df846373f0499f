"""What doctor says is exact: a capability is claimed only where it exists."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from dexport.exporter import machine
from dexport.exporter.machine import Ability, Gpu, describe_machine, package_version, visible_gpus
from dexport.runtime import int8_products

ADA = Gpu("NVIDIA RTX 4090", "sm89", 24 << 30, "580.65.06")
HOPPER = Gpu("NVIDIA H100", "sm90", 80 << 30, "580.65.06")
CAPABILITIES = {
    "export",
    "run_onnx_cpu",
    "multiply_int8_exactly",
    "run_onnx_cuda",
    "build_rtx_engine",
    "build_tensorrt_engine",
    "run_engine",
}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend which GPUs, TensorRT packages and ONNX Runtime providers there are."""

    def pretend(gpus: tuple[Gpu, ...] = (), packages: tuple[str, ...] = (), providers: tuple[str, ...] = ()) -> None:
        def import_problem(module: str, extra: str) -> Ability | None:
            return None if module in packages else Ability(False, f"{module} is not installed", f"[{extra}]")

        monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
        monkeypatch.setattr(machine, "_import_problem", import_problem)
        monkeypatch.setattr(machine, "_onnxruntime_providers", lambda: (providers, ""))

    return pretend


def test_description_is_complete_json() -> None:
    description = json.loads(json.dumps(describe_machine()))
    assert {"python", "os", "cpu_count", "ram_bytes", "disk_free_bytes", "gpus", "packages"} <= set(description)
    assert description["packages"]["onnx"]["version"]
    assert description["packages"]["tensorrt"]["extra"] == "gpu"
    assert "CPUExecutionProvider" in description["onnxruntime_providers"]
    assert set(description["can"]) == CAPABILITIES
    for ability in description["can"].values():
        assert ability["why"]
        assert ability["ok"] or ability["fix"]


def test_absent_package_is_null_and_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "package_version", lambda _: None)
    package = describe_machine()["packages"]["tensorrt-rtx"]
    assert package == {"version": None, "extra": "rtx", "fix": "pip install 'dexport[rtx]'"}


def test_package_version_takes_the_first_installed() -> None:
    assert package_version(("no-such-distribution-zz", "numpy")) == package_version(("numpy",))
    assert package_version(("no-such-distribution-zz",)) is None


def test_without_gpu_rtx_builds_but_does_not_run(world: Any) -> None:
    world(packages=("tensorrt_rtx", "tensorrt"), providers=("CPUExecutionProvider",))
    can = describe_machine()["can"]
    assert can["export"]["ok"]
    assert can["run_onnx_cpu"]["ok"]
    assert can["build_rtx_engine"]["ok"]
    assert not can["build_tensorrt_engine"]["ok"]
    assert not can["run_onnx_cuda"]["ok"]
    assert not can["run_engine"]["ok"]
    assert "without" in can["run_engine"]["why"]


def test_ada_runs_rtx_engines(world: Any) -> None:
    world((ADA,), ("tensorrt_rtx",), ("CUDAExecutionProvider", "CPUExecutionProvider"))
    can = describe_machine()["can"]
    assert can["run_engine"]["ok"]
    assert "tensorrt-rtx" in can["run_engine"]["why"]
    assert can["run_onnx_cuda"]["ok"]
    assert not can["build_tensorrt_engine"]["ok"]


def test_hopper_cannot_run_rtx_engines(world: Any) -> None:
    world((HOPPER,), ("tensorrt_rtx",), ("CPUExecutionProvider",))
    can = describe_machine()["can"]
    assert can["build_rtx_engine"]["ok"]
    assert not can["run_engine"]["ok"]
    assert "does not support sm90" in can["run_engine"]["why"]
    assert "onnxruntime-gpu" in can["run_onnx_cuda"]["fix"]
    world((HOPPER,), ("tensorrt_rtx", "tensorrt"))
    assert describe_machine()["can"]["run_engine"]["why"].startswith("tensorrt engines")


def test_broken_package_is_not_called_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_native.py").write_text("raise OSError('libfoo.so.1: not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "has_module", lambda _: True)
    problem = machine._import_problem("broken_native", "rtx")
    assert problem is not None
    assert "installed but does not import: OSError: libfoo.so.1" in problem.why


def test_crashing_package_is_not_called_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "crashing_native.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "has_module", lambda _: True)
    problem = machine._import_problem("crashing_native", "rtx")
    assert problem is not None
    assert "exit status -6" in problem.why


def test_no_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_load_libcuda", lambda: None)
    assert visible_gpus() == ()


class FakeCuda:
    """The calls of libcuda that are made, for one GPU of compute capability 12.0."""

    def cuInit(self, flags: int) -> int:  # noqa: ARG002, N802
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:  # noqa: ARG002, N802
        buffer.value = b"NVIDIA GeForce RTX 5090"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: ARG002, N802
        memory._obj.value = 32 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, code: int, device: Any) -> int:  # noqa: ARG002, N802
        value._obj.value = {75: 12, 76: 0}[code]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0


def test_gpu_facts_come_from_libcuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_load_libcuda", FakeCuda)
    (gpu,) = visible_gpus()
    assert (gpu.name, gpu.target, gpu.memory_bytes) == ("NVIDIA GeForce RTX 5090", "sm120", 32 << 30)
    assert gpu.driver


def test_has_module_asks_find_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not machine.has_module("json")


@pytest.mark.parametrize(
    ("default", "avoidable", "ok", "words"),
    [(True, True, True, "is exact"), (False, True, True, "avoids saturation"), (False, False, False, "saturate")],
)
def test_a_product_shows_whether_int8_is_exact(
    default: bool, avoidable: bool, ok: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_products, "is_exact", lambda option=None: avoidable if option else default)
    found = describe_machine()["can"]["multiply_int8_exactly"]
    assert found["ok"] == ok and words in found["why"]
    assert ok or found["fix"]
