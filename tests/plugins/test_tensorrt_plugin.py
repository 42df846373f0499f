"""TensorRT registration against a stand-in with the documented interface: schemas agree, symbolic launches
evaluate to the launches that the CUDA driver gets."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from dexport.errors import MachineError
from dexport.plugins import tensorrt_plugin
from dexport.plugins.compile import PUBLISHED_SIZES, CompiledKernel
from dexport.plugins.launch import launch_of
from dexport.plugins.op import Dims, DType, Kernel, Op
from dexport.plugins.registry import all_ops, find_op
from dexport.plugins.tiles import preferred

BATCH = 5
FIXED_TYPES = {"float32": "DataType.FLOAT", "uint8": "DataType.UINT8"}
FIXED_FORMATS = {"float32": "FP32", "uint8": "UINT8"}


class Expression:
    """A symbolic size: knows only what TensorRT's does, and may not be compared or used as an integer."""

    def __init__(self, value: int, constant: bool = False) -> None:
        self.value, self.is_constant = value, constant

    def constant_value(self) -> int:
        assert self.is_constant
        return self.value

    def _with(self, other: int | Expression, function: Callable[[int, int], int]) -> Expression:
        known, size = (True, other) if isinstance(other, int) else (other.is_constant, other.value)
        return Expression(function(self.value, size), self.is_constant and known)

    def __add__(self, other: int | Expression) -> Expression:
        return self._with(other, int.__add__)

    def __sub__(self, other: int | Expression) -> Expression:
        return self._with(other, int.__sub__)

    def __mul__(self, other: int | Expression) -> Expression:
        return self._with(other, int.__mul__)

    def __floordiv__(self, other: int | Expression) -> Expression:
        return self._with(other, int.__floordiv__)

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a symbolic size is compared")

    def __bool__(self) -> bool:
        raise AssertionError("a symbolic size is used as a truth value")

    __hash__ = None  # type: ignore[assignment]


class TensorDesc:
    def __init__(self, shape: Any, dtype: str) -> None:
        self.shape_expr, self.dtype = list(shape), dtype

    def like(self) -> TensorDesc:
        return TensorDesc(self.shape_expr, self.dtype)


class KernelLaunchParams:
    grid_x: Any = 1
    grid_y: Any = 1
    grid_z: Any = 1
    block_x: Any = 1
    shared_mem: Any = 0


class SymExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Registration:
    """What was registered for one plugin."""

    describe: Callable[..., Any]
    tune: Callable[..., Any]
    implement: Callable[..., Any]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Registration]:
    """Registrations of all plugins with a pretended TensorRT."""
    plugins: dict[str, Registration] = {}

    def keeps(attribute: str) -> Any:
        def decorator_of(name: str) -> Any:
            def keep(function: Any) -> Any:
                setattr(plugins.setdefault(name, Registration()), attribute, function)
                return function

            return keep

        return decorator_of

    trtp = ModuleType("tensorrt.plugin")
    trtp.__dict__.update(
        TensorDesc=TensorDesc,
        KernelLaunchParams=KernelLaunchParams,
        SymExprs=SymExprs,
        SymIntExprs=SymExprs,
        SymInt32=lambda value: value,
        AutoTuneCombination=str,
        from_shape_expr=lambda shape, dtype: TensorDesc(shape, dtype),
        register=keeps("describe"),
        autotune=keeps("tune"),
        aot_impl=keeps("implement"),
    )
    trt = ModuleType("tensorrt")
    trt.__dict__.update(float32="DataType.FLOAT", plugin=trtp)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    monkeypatch.setattr(tensorrt_plugin, "_registered", [])
    monkeypatch.setattr(tensorrt_plugin, "this_gpu", lambda: "sm90")
    monkeypatch.setattr(tensorrt_plugin, "compile_kernel", pretend_to_compile)
    assert len(tensorrt_plugin.register_all()) == 5
    assert len(tensorrt_plugin.register_all()) == 5
    return plugins


def pretend_to_compile(kernel: Kernel, dims: Dims, dtype: DType, target: str) -> CompiledKernel:
    tile = preferred(kernel, target, dtype)
    return CompiledKernel(
        kernel, target, dtype, dims, tile, kernel.name, tile.warps * 32, 1024, 64, 0, "ptx", "sha", b""
    )


WITH_PLUGIN = pytest.mark.parametrize("op", [op for op in all_ops() if op.plugin], ids=lambda op: op.name)


@WITH_PLUGIN
def test_schema(registry: dict[str, Registration], op: Op) -> None:
    plugin = registry[f"dexport::{op.name}"]
    tensors, attributes = [t.name for t in op.inputs], [a.name for a in op.attributes]
    assert list(inspect.signature(plugin.describe).parameters) == [*tensors, *attributes]
    implemented = list(inspect.signature(plugin.implement).parameters)
    assert implemented == [*tensors, *attributes, "outputs", "tactic"]
    assert list(inspect.signature(plugin.tune).parameters) == [*tensors, "outputs"]
    for function in (plugin.describe, plugin.implement, plugin.tune):
        hints = inspect.signature(function).parameters
        assert all(hints[name].annotation is TensorDesc for name in tensors)
        assert all(hints[name].annotation is int for name in attributes if name in hints)
    result = inspect.signature(plugin.describe).return_annotation
    assert typing.get_args(result) == (TensorDesc,) * len(op.outputs)
    assert len(typing.get_args(inspect.signature(plugin.implement).return_annotation)) == 4


@WITH_PLUGIN
def test_outputs_and_types(registry: dict[str, Registration], op: Op) -> None:
    plugin = registry[f"dexport::{op.name}"]
    inputs, attributes, dims = described(op)
    outputs = plugin.describe(*inputs, **attributes)
    for schema, output in zip(op.outputs, outputs, strict=True):
        assert [size.value for size in output.shape_expr] == list(schema.dims(dims))
        assert output.dtype == ("DataType.FLOAT" if schema.dtype else "DataType.HALF")
    combinations = plugin.tune(*inputs, outputs)
    assert len(combinations) == 3
    schemas = (*op.inputs, *op.outputs)
    for combination in combinations:
        types = combination.split(", ")
        assert types == [FIXED_FORMATS.get(schema.dtype, types[0]) for schema in schemas]


@WITH_PLUGIN
def test_symbolic_launch_is_the_drivers(registry: dict[str, Registration], op: Op) -> None:
    inputs, attributes, dims = described(op)
    plugin = registry[f"dexport::{op.name}"]
    outputs = plugin.describe(*inputs, **attributes)
    entry, ptx, parameters, extra = plugin.implement(*inputs, **attributes, outputs=outputs, tactic=0)
    assert op.plugin is not None
    launch = launch_of(pretend_to_compile(op.plugin, dims, "float16", "sm90"), dims)
    grid = tuple(value(parameters, name) for name in ("grid_x", "grid_y", "grid_z"))
    assert (entry, ptx, grid) == (op.plugin.name, "ptx", launch.grid)
    assert (parameters.block_x, parameters.shared_mem) == (launch.block[0], launch.shared_bytes)
    assert [size.value for size in extra] == list(launch.scalars.values())


def test_what_does_not_fit_says_what_to_do(registry: dict[str, Registration]) -> None:
    inputs, attributes, _ = described(find_op("DexLinearAttention"))
    for tensor in inputs:
        tensor.dtype = "DataType.FLOAT"
    with pytest.raises(MachineError, match="no kernel for float32") as caught:
        registry["dexport::DexLinearAttention"].implement(*inputs, **attributes, outputs=(), tactic=0)
    assert "--plugins off" in caught.value.hint


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    monkeypatch.setattr(tensorrt_plugin, "_registered", [])
    with pytest.raises(MachineError, match="is needed for this"):
        tensorrt_plugin.register_all()


def described(op: Op) -> tuple[list[TensorDesc], dict[str, int], Dims]:
    """Descriptions of the op's inputs at a published size with a symbolic batch, its attributes, its
    sizes."""
    family = "DexChannelAttention" if op.name.startswith("DexChannel") else op.name
    shapes, attributes = PUBLISHED_SIZES[family][0]
    dims = {**find_op(family).dims(shapes, attributes), "B": BATCH}
    inputs = [
        TensorDesc(
            (
                Expression(size, constant=name != "B")
                for name, size in zip(schema.shape, schema.dims(dims), strict=True)
            ),
            FIXED_TYPES.get(schema.dtype, "DataType.HALF"),
        )
        for schema in op.inputs
    ]
    return inputs, dict(attributes), dims


def value(parameters: Any, name: str) -> int:
    size = getattr(parameters, name)
    return size.value if isinstance(size, Expression) else size
