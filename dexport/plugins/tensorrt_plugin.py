"""What the TensorRT plugins share: compile for this GPU, and describe the launch with TensorRT's symbols.

A quick deployable plugin with an ahead-of-time implementation embeds PTX in the engine, which then needs
neither Python nor a plugin library. It is one kernel; its arguments are the inputs, the extra integers, the
outputs.

TensorRT cannot be installed where this was written: nothing here has been executed with it. Tests run it
against a stand-in for ``tensorrt.plugin`` with the interface of its documentation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dexport.errors import MachineError
from dexport.optional import optional_import
from dexport.plugins.compile import CompiledKernel, compile_kernel
from dexport.plugins.op import DOMAIN, Dims, DType, Op

SHARED_LIMIT = 48 << 10
"""TensorRT is not known to ask the driver for more dynamic shared memory than this."""

DTYPE_NAMES: Mapping[str, DType] = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}
FORMAT_NAMES = ("FP16", "BF16", "FP32")
MODULES = ("tmsa", "linear_attention", "channel_attention", "ternary_matmul")


def register_all() -> tuple[str, ...]:
    """Register every plugin with TensorRT, once per process; returns their ids.

    Raises:
        MachineError: TensorRT is not installed.
    """
    for module in MODULES:
        importlib.import_module(f"dexport.plugins.{module}.plugin").register()
    return tuple(_registered)


_registered: list[str] = []


def register_plugin(
    op: Op, describe: Callable[..., Any], implement: Callable[..., Any], tune: Callable[..., Any]
) -> None:
    """Register one plugin; does nothing when it already is.

    Args:
        describe: (inputs, attributes) -> tuple of output descriptions.
        implement: (inputs, attributes, ``outputs``, ``tactic``) -> what :func:`implementation` returns.
        tune: (inputs, ``outputs``) -> what :func:`same_types` returns.
    """
    name = plugin_id(op)
    if name in _registered:
        return
    trtp: Any = optional_import("tensorrt.plugin")
    tensors = {tensor.name: trtp.TensorDesc for tensor in op.inputs}
    attributes = {attribute.name: int for attribute in op.attributes}
    outputs = _generic(tuple, *(trtp.TensorDesc,) * len(op.outputs))
    result = _generic(tuple, str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs)
    # TensorRT reads the schema from the annotations, which can only be made where it is installed.
    describe.__annotations__ = {**tensors, **attributes, "return": outputs}
    tune.__annotations__ = {**tensors, "outputs": outputs, "return": _generic(list, trtp.AutoTuneCombination)}
    implement.__annotations__ = {**tensors, **attributes, "outputs": outputs, "tactic": int, "return": result}
    trtp.register(name)(describe)
    trtp.autotune(name)(tune)
    trtp.aot_impl(name)(implement)
    _registered.append(name)


def _generic(container: Any, *parameters: Any) -> Any:
    """``container[parameters]`` of types that exist only at run time."""
    return container[parameters]


def plugin_id(op: Op) -> str:
    """``namespace::name``: the parser looks a node up by its domain and operator type."""
    return f"{DOMAIN}::{op.name}"


def same_types(formats: Iterable[str]) -> list[Any]:
    """One combination per supported type; ``T`` in ``formats`` stands for it."""
    trtp = optional_import("tensorrt.plugin")
    formats = list(formats)
    return [
        trtp.AutoTuneCombination(", ".join(name if item == "T" else item for item in formats)) for name in FORMAT_NAMES
    ]


def this_gpu() -> str:
    """Target of the GPU that the engine is built on: TensorRT builds for the GPU at hand."""
    import torch

    if not torch.cuda.is_available():
        raise MachineError("TensorRT plugins are compiled for the GPU at hand, and there is none")
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def implementation(op: Op, inputs: Sequence[Any], attributes: Mapping[str, int]) -> tuple[str, str, Any, Any]:
    """(entry, PTX, launch parameters, extra arguments) of a node, for TensorRT.

    Raises:
        MachineError: the kernel does not fit these sizes as a plugin; the ONNX function does.
    """
    assert op.plugin is not None
    dims = symbolic_dims(op, inputs, attributes)
    dtype = DTYPE_NAMES[str(inputs[0].dtype).rpartition(".")[2]]
    hint = "build with --plugins off: the engine then computes the op's ONNX function"
    if not op.plugin.fits(dims, dtype):
        raise MachineError(f"{op.name} has no kernel for {dtype} and these sizes", hint=hint)
    compiled = compile_kernel(op.plugin, dims, dtype, this_gpu())
    if compiled.shared_bytes > SHARED_LIMIT:
        raise MachineError(f"{op.name} needs {compiled.shared_bytes} bytes of shared memory", hint=hint)
    return compiled.entry, compiled.ptx, launch_parameters(compiled, dims), extra_arguments(compiled, dims)


def symbolic_dims(op: Op, inputs: Sequence[Any], attributes: Mapping[str, int]) -> Dims:
    """Sizes of a node: integers, except the batch, which stays an expression."""
    shapes = [
        [size.constant_value() if size.is_constant else size for size in description.shape_expr]
        for description in inputs
    ]
    return op.dims(shapes, attributes)


def launch_parameters(compiled: CompiledKernel, dims: Dims) -> Any:
    """``KernelLaunchParams`` of the launch that :mod:`dexport.plugins.launch` makes."""
    parameters = optional_import("tensorrt.plugin").KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = compiled.grid(dims)
    parameters.block_x = compiled.threads
    parameters.shared_mem = compiled.shared_bytes
    return parameters


def extra_arguments(compiled: CompiledKernel, dims: Dims) -> Any:
    """The kernel's int32 scalars, in order."""
    trtp = optional_import("tensorrt.plugin")
    scalars = compiled.kernel.scalars
    arguments = trtp.SymIntExprs(len(scalars))
    for index, name in enumerate(scalars):
        arguments[index] = trtp.SymInt32(dims[name])
    return arguments
