"""Whatever the calling program has set in PyTorch: results are the same, and its settings are as it left them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _len_torch_dispatch_stack

import dexport
from dexport.bundle import load_bundle
from dexport.errors import UsageError
from dexport.exporter.pytorch.state import FLOAT32, fresh_torch
from dexport.exporter.recipes import find_recipe
from dexport.validate.bench.bench import PYTORCH, bench
from dexport.validate.build import quantise_and_validate
from dexport.validate.compare.diff import diff
from dexport.validate.levels.forward import ParityReport
from dexport.validate.validate import validate
from tests.bundles import NARROW

GATE = 1e-6
"""Float32 against float32; products in bfloat16 are off by 1e-3."""


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.nn.functional.linear else result


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reached a mode of the caller")


@contextlib.contextmanager
def setting(put: Callable[[Any], object], value: Any, usual: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(usual)


def matmul_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = on


def mkldnn_matmul(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


def everywhere(precision: str) -> None:
    torch.backends.fp32_precision = precision


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "mkldnn bf16": lambda: setting(mkldnn_matmul, "bf16", "none"),
    "tf32 everywhere": lambda: setting(everywhere, "tf32", "none"),
    "cuda tf32": lambda: setting(matmul_tf32, True, False),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "flash only": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "fake tensors": FakeTensorMode,
    "function mode": Doubled,
    "dispatch mode": Refusing,
}


def snapshot() -> dict[str, Any]:
    with _disable_current_modes():
        random = torch.get_rng_state().tolist() if not _len_torch_function_stack() else None
    return {
        "random": random,
        "precisions": {place: torch._C._get_fp32_precision_getter(*place) for place in FLOAT32},
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "modes": (_len_torch_function_stack(), _len_torch_dispatch_stack()),
        "device": getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def states(*names: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(STATES[name]())
        yield


@pytest.mark.parametrize("name", list(STATES))
def test_a_block_runs_as_in_a_fresh_process(name: str) -> None:
    with fresh_torch():
        fresh = snapshot()
    with states(name):
        before = snapshot()
        with fresh_torch():
            assert {**snapshot(), "random": None} == {**fresh, "random": None}
            assert torch.ones(2).mul(3).tolist() == [3.0, 3.0]
            torch.rand(3)
        assert snapshot() == before
        with contextlib.suppress(ZeroDivisionError), fresh_torch():
            torch.set_default_dtype(torch.float16)
            torch.set_default_device("meta")
            raise ZeroDivisionError
        assert snapshot() == before


@pytest.mark.parametrize(
    "names",
    [
        ("medium", "float64", "default device", "no grad", "deterministic", "no mkldnn", "flash only"),
        ("mkldnn bf16", "bfloat16", "device", "autocast", "inference mode"),
        ("tf32 everywhere", "cuda tf32", "function mode", "dispatch mode", "fake tensors"),
    ],
    ids=lambda names: names[0],
)
def test_a_build_is_as_in_a_fresh_process(names: tuple[str, ...], tmp_path: Path) -> None:
    with states(*names):
        before = snapshot()
        result = dexport.build("dit-fashion", tmp_path / "out", settings=NARROW, profile="ci")
        with pytest.raises(UsageError):
            dexport.build("dit-fashion", tmp_path / "none", settings={"depth": "deep"})
        assert snapshot() == before
    assert isinstance(result.verdict, ParityReport)
    assert max(check.metrics.relative_l2 for check in result.verdict.checks) < GATE


def test_everything_that_is_done_with_a_bundle_is_too(plain: Path, tmp_path: Path) -> None:
    with states("medium", "float64", "device", "autocast", "inference mode"):
        before = snapshot()
        bundle = load_bundle(plain)
        forward = validate(bundle, ["forward"]).forward.values()
        compared = diff(bundle)
        timed = bench(plain, rounds=1)
        quantise_and_validate(plain, tmp_path / "int8", int8="weight")
        assert snapshot() == before
    assert max(check.metrics.relative_l2 for report in forward for check in report.checks) < GATE
    assert compared.passed
    assert compared.outputs < GATE
    assert any(row.owner == PYTORCH for result in timed.results for row in result.rows)


def test_what_a_recipe_file_sets_goes_no_further(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from dexport.exporter.recipes import find_recipe\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_float32_matmul_precision('medium')\n"
        "torch.manual_seed(5)\n"
        "torch.set_default_device('meta')\n"
        "RECIPE = find_recipe('dit-fashion')\n"
    )
    before = snapshot()
    assert find_recipe(str(file)).name == "dit-fashion"
    assert snapshot() == before
