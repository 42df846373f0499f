"""What this machine has and what it can do: the facts behind engine selection and ``dexport doctor``.

Imports neither torch nor TensorRT into this process: a native library that crashes on import must not
take dexport with it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

# SM 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1 are the members of TensorRT-RTX 1.7's ComputeCapability.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

RTX_DISTRIBUTIONS = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_IMPORT_TIMEOUT_S = 120


@dataclass(frozen=True)
class _Package:
    """A package that doctor lists: the distributions that may bring it, and the extra that installs it."""

    distributions: tuple[str, ...]
    extra: str | None = None


_PACKAGES = {
    "torch": _Package(("torch",)),
    "onnx": _Package(("onnx",)),
    "onnxruntime": _Package(("onnxruntime", "onnxruntime-gpu")),
    "onnx-ir": _Package(("onnx-ir",)),
    "onnxscript": _Package(("onnxscript",)),
    "polygraphy": _Package(("polygraphy",), "rtx"),
    "tensorrt": _Package(TENSORRT_DISTRIBUTIONS, "gpu"),
    "tensorrt-rtx": _Package(RTX_DISTRIBUTIONS, "rtx"),
    "pycuda": _Package(("pycuda",), "gpu"),
    "safetensors": _Package(("safetensors",)),
    "huggingface_hub": _Package(("huggingface_hub",)),
}


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that CUDA programs started here would see.

    Attributes:
        target: compute capability, such as ``sm89``.
        memory_bytes: total device memory.
        driver: version of the driver, or what is known of it.
    """

    name: str
    target: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Ability:
    """Whether this machine can do one thing, why, and what to do if it cannot."""

    ok: bool
    why: str
    fix: str = ""


def visible_gpus() -> tuple[Gpu, ...]:
    """GPUs that the CUDA driver shows to this process; empty without a driver.

    Asks libcuda itself: unlike nvidia-smi it heeds CUDA_VISIBLE_DEVICES. Creates no CUDA context.
    """
    cuda = _load_libcuda()
    if cuda is None or cuda.cuInit(0) != 0:
        return ()
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    driver = _driver_version(cuda)
    return tuple(_query_gpu(cuda, index, driver) for index in range(count.value))


def package_version(distributions: Sequence[str]) -> str | None:
    """Version of the first of these distributions that is installed, None if none is."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def package_versions() -> dict[str, str | None]:
    """Installed version, or None, of every package that shapes a build."""
    return {name: package_version(package.distributions) for name, package in _PACKAGES.items()}


def has_module(module: str) -> bool:
    """Whether a top-level module could be imported; does not import it."""
    return importlib.util.find_spec(module) is not None


def describe_machine() -> dict[str, Any]:
    """Everything ``dexport doctor`` prints, as JSON types.

    ``can`` maps a capability to ``{ok, why, fix}``. TensorRT packages are imported in a child process to
    learn whether their libraries load, which takes up to a second each.
    """
    gpus = visible_gpus()
    providers, provider_problem = _onnxruntime_providers()
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu_count": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "ram_available_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "gpus": [asdict(gpu) for gpu in gpus],
        "packages": {name: _describe_package(package) for name, package in _PACKAGES.items()},
        "onnxruntime_providers": list(providers),
        "can": {name: asdict(ability) for name, ability in _abilities(gpus, providers, provider_problem).items()},
    }


def _abilities(gpus: Sequence[Gpu], providers: Sequence[str], provider_problem: str) -> dict[str, Ability]:
    rtx_problem = _import_problem("tensorrt_rtx", "rtx")
    tensorrt_problem = _import_problem("tensorrt", "gpu")
    return {
        "export": _can_export(),
        "run_onnx_cpu": _can_run_onnx_cpu(providers, provider_problem),
        "multiply_int8_exactly": _can_multiply_int8_exactly(providers, provider_problem),
        "run_onnx_cuda": _can_run_onnx_cuda(gpus, providers, provider_problem),
        "build_rtx_engine": _can_build_rtx(rtx_problem),
        "build_tensorrt_engine": _can_build_tensorrt(gpus, tensorrt_problem),
        "run_engine": _can_run_engine(gpus, rtx_problem, tensorrt_problem),
    }


def _can_export() -> Ability:
    needed = {"torch": "torch", "onnx": "onnx", "onnx_ir": "onnx-ir", "onnxscript": "onnxscript"}
    missing = [name for module, name in needed.items() if not has_module(module)]
    if missing:
        return Ability(False, f"not installed: {', '.join(missing)}", "pip install dexport")
    return Ability(True, "torch, onnx, onnx-ir and onnxscript are installed; a GPU is not needed")


def _can_run_onnx_cpu(providers: Sequence[str], problem: str) -> Ability:
    if "CPUExecutionProvider" in providers:
        return Ability(True, "ONNX Runtime has its CPU provider")
    return Ability(False, problem or "ONNX Runtime lists no CPU provider", "pip install onnxruntime")


def _can_multiply_int8_exactly(providers: Sequence[str], problem: str) -> Ability:
    """Of W8A8: what dexport's sessions do, which a product shows."""
    on_cpu = _can_run_onnx_cpu(providers, problem)
    if not on_cpu.ok:
        return on_cpu
    from dexport.runtime.int8_products import SATURATES, SET_ELSEWHERE, UNSIGNED, is_exact

    if is_exact():
        return Ability(True, "a product of the largest int8 codes is exact")
    if is_exact(UNSIGNED):
        return Ability(True, f"dexport avoids saturation, which costs time; {SATURATES}", SET_ELSEWHERE)
    return Ability(False, SATURATES, "pip install --upgrade onnxruntime, or run W8A8 on another CPU")


def _can_run_onnx_cuda(gpus: Sequence[Gpu], providers: Sequence[str], problem: str) -> Ability:
    if not gpus:
        return Ability(False, "no NVIDIA GPU is visible", "use a machine with one")
    if "CUDAExecutionProvider" in providers:
        return Ability(True, f"ONNX Runtime has its CUDA provider, and there is a {gpus[0].name}")
    why = problem or "this ONNX Runtime has no CUDA provider"
    return Ability(False, why, "pip uninstall onnxruntime, then pip install onnxruntime-gpu: both own one module")


def _can_build_rtx(import_problem: Ability | None) -> Ability:
    if import_problem:
        return import_problem
    return Ability(True, f"tensorrt_rtx imports; it builds without a GPU, for {', '.join(RTX_TARGETS)}")


def _can_build_tensorrt(gpus: Sequence[Gpu], import_problem: Ability | None) -> Ability:
    if not gpus:
        return Ability(
            False,
            "tensorrt needs a GPU to build, and no NVIDIA GPU is visible",
            "build with --engine tensorrt-rtx, or on a machine with a GPU",
        )
    if import_problem:
        return import_problem
    return Ability(True, f"tensorrt imports, and it builds for the {gpus[0].name} ({gpus[0].target})")


def _can_run_engine(gpus: Sequence[Gpu], rtx_problem: Ability | None, tensorrt_problem: Ability | None) -> Ability:
    if not gpus:
        return Ability(
            False,
            "no NVIDIA GPU is visible, and no engine can even be deserialized without one",
            "build here, then copy the bundle to a machine with a GPU",
        )
    target = gpus[0].target
    usable = [] if tensorrt_problem else ["tensorrt"]
    if not rtx_problem and target in RTX_TARGETS:
        usable.append("tensorrt-rtx")
    if usable:
        return Ability(True, f"{' and '.join(usable)} engines built for {target} run on the {gpus[0].name}")
    if not rtx_problem:
        return Ability(False, f"tensorrt-rtx does not support {target} ({gpus[0].name})", "pip install 'dexport[gpu]'")
    return tensorrt_problem or rtx_problem


def _import_problem(module: str, extra: str) -> Ability | None:
    """None if ``module`` and polygraphy are usable here; else what is wrong. Imports in a child process."""
    fix = f"pip install 'dexport[{extra}]'"
    for needed in (module, "polygraphy"):
        if not has_module(needed):
            return Ability(False, f"{needed} is not installed", fix)
    try:
        child = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ability(False, f"importing {module} takes over {_IMPORT_TIMEOUT_S} s", fix)
    if child.returncode == 0:
        return None
    last_line = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return Ability(False, f"{module} is installed but does not import: {last_line}", fix)


def _onnxruntime_providers() -> tuple[tuple[str, ...], str]:
    """Execution providers of the installed ONNX Runtime, and why there are none."""
    try:
        import onnxruntime
    except ImportError as error:
        return (), f"onnxruntime does not import: {error}"
    return tuple(onnxruntime.get_available_providers()), ""


def _describe_package(package: _Package) -> dict[str, Any]:
    version = package_version(package.distributions)
    fix = f"pip install 'dexport[{package.extra}]'" if package.extra else "pip install dexport"
    return {"version": version, "extra": package.extra, "fix": None if version else fix}


def _load_libcuda() -> ctypes.CDLL | None:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _query_gpu(cuda: ctypes.CDLL, index: int, driver: str) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
    major, minor = (_device_attribute(cuda, device, code) for code in (75, 76))
    return Gpu(name.value.decode(errors="replace"), f"sm{major}{minor}", memory.value, driver)


def _device_attribute(cuda: ctypes.CDLL, device: ctypes.c_int, code: int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), code, device)
    return value.value


def _driver_version(cuda: ctypes.CDLL) -> str:
    """The kernel driver's version such as 580.65.06; where it is hidden, the CUDA version it supports."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    if found:
        return found.group(1)
    supported = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(supported))
    return f"for CUDA {supported.value // 1000}.{supported.value % 1000 // 10}"
