"""Every kernel compiles, assembles and fits its registers on every target; done in a process without the
interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from dexport.errors import MachineError, UsageError
from dexport.plugins.compile import (
    TARGETS,
    compile_kernel,
    parse_ptxas_log,
    without_scratch_parameters,
)
from dexport.plugins.registry import all_ops, find_op

SCRIPT = """
import json, sys
from dexport.plugins.compile import PUBLISHED_SIZES, compile_op
from dexport.plugins.registry import find_op
wanted = [("float16", t) for t in sys.argv[1:]] + [("bfloat16", "sm90"), ("float32", "sm80")]
for name, index in (("DexTMSA", 0), ("DexLinearAttention", 0), ("DexChannelAttention", 3), ("DexTernaryMatMul", 0)):
    op = find_op(name)
    dims = op.dims(*PUBLISHED_SIZES[name][index])
    for dtype, target in wanted:
        for built in compile_op(op, dims, dtype, target):
            header = built.ptx[built.ptx.index(".entry"):].partition(")")[0]
            print(json.dumps({
                **built.summary(),
                "header": header,
                "ptx_head": built.ptx[:300],
                "parameters": built.parameters,
                "elf": built.cubin[:4] == b"\\x7fELF",
            }))
"""


QUICK = ("sm80", "sm120")
"""The oldest one, and the newest: the least shared memory, and the newest PTX. Six seconds a target."""


@pytest.fixture(
    scope="module",
    params=[QUICK, pytest.param(TARGETS, marks=pytest.mark.slow)],
    ids=["the oldest and the newest", "all"],
)
def targets(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


@pytest.fixture(scope="module")
def built(targets: tuple[str, ...]) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="compiling needs triton: pip install 'dexport[plugins]'")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *targets],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_for_every_target(built: list[dict[str, Any]], targets: tuple[str, ...]) -> None:
    kernels = {kernel.name for op in all_ops() for kernel in op.all_kernels()}
    assert {(b["kernel"], b["target"]) for b in built if b["dtype"] == "float16"} == {
        (kernel, target) for kernel in kernels for target in targets
    }
    assert {b["dtype"] for b in built} == {"float16", "bfloat16", "float32"}


def test_fits_registers_and_shared_memory(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        assert kernel["elf"], kernel
        assert kernel["spill_bytes"] == 0, kernel
        assert 0 < kernel["registers"] <= 255
        # sm89 and sm120 have 99 KiB; a plugin gets 48 KiB without asking.
        limit = 48 << 10 if kernel["dtype"] != "float32" else 99 << 10
        assert kernel["shared_bytes"] <= limit, kernel


def test_entry_takes_what_the_launch_passes(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        types = re.findall(r"\.param \.(\w+)", kernel["header"])
        assert types == ["u64" if kind == "tensor" else "u32" for _, kind in kernel["parameters"]], kernel
        architecture = kernel["target"].removeprefix("sm")
        assert re.search(rf"\.target sm_{architecture}a?\b", kernel["ptx_head"])


def test_old_drivers_take_the_ptx(built: list[dict[str, Any]]) -> None:
    """PTX ISA 8.0 is CUDA 12.0; 8.7 is CUDA 12.8, the first with Blackwell."""
    for kernel in built:
        version = re.search(r"\.version (\d+\.\d+)", kernel["ptx_head"])
        assert version is not None
        newest = 8.7 if kernel["target"] in ("sm100", "sm120") else 8.0
        assert float(version.group(1)) <= newest


def test_ptxas_log() -> None:
    log = "0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\nUsed 77 registers, 396 bytes cmem"
    assert parse_ptxas_log(log) == (77, 24)
    with pytest.raises(MachineError, match="no registers"):
        parse_ptxas_log("")


PTX = """
.visible .entry name(
	.param .u64 .ptr .global .align 16 name_param_0,
	.param .u64 .ptr .global .align 1 name_param_1,
	.param .u64 .ptr .global .align 1 name_param_2
)
.reqntid 128
{ ld.param.b64 %rd1, [name_param_USED]; }
"""


def test_scratch_parameters_go_only_when_unused() -> None:
    stripped = without_scratch_parameters(PTX.replace("USED", "0"), "name")
    assert re.findall(r"name_param_\d", stripped) == ["name_param_0", "name_param_0"]
    with pytest.raises(MachineError, match="scratch"):
        without_scratch_parameters(PTX.replace("USED", "1"), "name")
    with pytest.raises(MachineError, match="no entry other"):
        without_scratch_parameters(PTX, "other")


@pytest.mark.parametrize("target", ["sm75", "90", "ada"])
def test_unknown_targets_are_refused(target: str) -> None:
    op = find_op("DexTMSA")
    with pytest.raises(UsageError, match="is not a target"):
        compile_kernel(op.kernels[0], {}, "float16", target)
