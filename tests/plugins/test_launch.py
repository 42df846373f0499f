"""The launcher hands the driver what the kernels expect: a stand-in driver runs the interpreter on raw
pointers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from running import TOLERANCES, error, reference
from test_agreement import channel_inputs, linear_inputs, ternary_inputs, tmsa_inputs
from test_tensorrt_plugin import pretend_to_compile

from dexport.errors import InputError
from dexport.plugins import launch as launcher
from dexport.plugins.launch import Launch, launch_of, pack, run
from dexport.plugins.op import Op
from dexport.plugins.registry import find_op

CASES = {
    "DexTMSA": (tmsa_inputs(2, 4, 2, 24, torch.float16), {"num_heads": 2, "window": 4}),
    "DexLinearAttention": (linear_inputs(3, 21, 2, 40, torch.float16), {"num_heads": 2}),
    "DexChannelAttention": (channel_inputs(18, 40, 3, 5, torch.float16), {}),
    "DexTernaryMatMul": (ternary_inputs(3, 25, 40, 20, torch.float16), {}),
}


class InterpreterDriver:
    """Runs each launch in Triton's interpreter, on tensors made from the packed pointers."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def launch(self, launch: Launch, packed: tuple[tuple[Any, ...], tuple[Any, ...]], stream: int) -> None:
        assert stream == 0
        kernel = launch.compiled.kernel
        schemas = {tensor.name: tensor for tensor in kernel.tensors}
        arguments: list[Any] = []
        for (name, kind), value, type_ in zip(launch.arguments, *packed, strict=True):
            assert type_ is (ctypes.c_void_p if kind == "tensor" else ctypes.c_int32)
            arguments.append(self.at(value, launch, schemas[name]) if kind == "tensor" else value)
        constants = kernel.constants(launch.compiled.dims, launch.compiled.dtype)
        kernel.function()[launch.grid](*arguments, **constants, **launch.compiled.tile.blocks)
        self.launched.append(kernel.name)

    def at(self, pointer: int, launch: Launch, schema: Any) -> torch.Tensor:
        shape = schema.dims(launch.compiled.dims)
        dtype = getattr(torch, schema.dtype or launch.compiled.dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        return torch.frombuffer((ctypes.c_byte * size).from_address(pointer), dtype=dtype).reshape(shape)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "compile_kernel", pretend_to_compile)


@pytest.mark.parametrize("name", CASES)
def test_run(name: str) -> None:
    pytest.importorskip("triton")
    op, (inputs, attributes), driver = find_op(name), CASES[name], InterpreterDriver()
    actual = run(op, inputs, attributes, driver, "sm90")
    assert error(actual, reference(op, inputs, attributes)) <= TOLERANCES[torch.float16]
    dims = op.dims([tuple(x.shape) for x in inputs], attributes)
    assert driver.launched == [kernel.name for kernel in op.plan(dims, "float16")]


def test_large_channel_attention_takes_two_launches() -> None:
    pytest.importorskip("triton")
    op, driver = find_op("DexChannelAttention"), InterpreterDriver()
    inputs = channel_inputs(2, 33, 25, 41, torch.float16)
    assert error(run(op, inputs, {}, driver, "sm90"), reference(op, inputs, {})) <= TOLERANCES[torch.float16]
    assert driver.launched == ["dex_channel_attention_pool", "dex_channel_attention_scale"]


def scale_launch(op: Op, batch: int) -> Launch:
    dims = op.dims([(batch, 40, 3, 5), (batch, 40), (40, 40, 1, 1), (40,)], {})
    assert op.plugin is not None
    return launch_of(pretend_to_compile(op.plugin, dims, "float16", "sm90"), dims)


def test_pack_orders_inputs_scalars_outputs() -> None:
    launch = scale_launch(find_op("DexChannelAttentionScale"), 18)
    pointers = {"out": 64, "x": 16, "bias": 128, "weight": 256, "pooled": 32, "unrelated": 1}
    values, types = pack(launch, pointers)
    assert values == (16, 32, 256, 128, 18, 64)
    assert types == (ctypes.c_void_p,) * 4 + (ctypes.c_int32, ctypes.c_void_p)
    assert launch.grid == (3, 2, 1)


def test_bad_pointers_are_named() -> None:
    launch = scale_launch(find_op("DexChannelAttentionScale"), 2)
    with pytest.raises(InputError, match="needs the tensor pooled"):
        pack(launch, {"x": 16})
    with pytest.raises(InputError, match="x is not aligned"):
        pack(launch, {"x": 8})


def test_tensors_that_are_not_contiguous_are_named() -> None:
    q, k, v = linear_inputs(2, 4, 2, 16, torch.float32)
    with pytest.raises(InputError, match="k is not contiguous"):
        run(
            find_op("DexLinearAttention"),
            [q, k.transpose(1, 2).contiguous().transpose(1, 2), v],
            {"num_heads": 2},
            InterpreterDriver(),
            "sm90",
        )


def test_a_grid_beyond_cuda_is_refused() -> None:
    op = find_op("DexTMSA")
    dims = {**op.dims([(2, 9, 48), (2, 48), (2, 25)], {"num_heads": 2, "window": 3}), "B": 65536}
    with pytest.raises(InputError, match="smaller batch"):
        launch_of(pretend_to_compile(op.kernels[0], dims, "float16", "sm90"), dims)
