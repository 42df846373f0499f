"""Run the compiled PTX on a GPU without TensorRT: the same PTX, grid and arguments that a plugin has.

The CUDA driver is reached through cuda-python (``cuda.bindings.driver``). No GPU was at hand when this was
written: what talks to the driver (:class:`CudaDriver`) has not been executed; the planning and the packing
of arguments are tested.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dexport.errors import InputError, MachineError
from dexport.optional import optional_import
from dexport.plugins.compile import CompiledKernel, compile_kernel
from dexport.plugins.op import Dims, DType, Op, Tensor

DEFAULT_SHARED_LIMIT = 48 << 10
"""Dynamic shared memory that a kernel may use without asking."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything that the driver is told.

    ``arguments`` are (name, kind), where kind is ``tensor`` for a device pointer or ``int32``; ``scalars``
    gives the values of the latter.
    """

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[tuple[str, str], ...]
    scalars: Mapping[str, int]


class Driver(Protocol):
    """What :func:`run` needs of a CUDA driver."""

    def launch(self, launch: Launch, packed: tuple[tuple[Any, ...], tuple[Any, ...]], stream: int) -> None: ...


def plan(op: Op, dims: Dims, dtype: DType, target: str) -> tuple[Launch, ...]:
    """Compile the op's kernels and compute their launches, in order."""
    return tuple(launch_of(compile_kernel(kernel, dims, dtype, target), dims) for kernel in op.plan(dims, dtype))


def launch_of(compiled: CompiledKernel, dims: Dims) -> Launch:
    """The launch of a compiled kernel at a batch of ``dims["B"]``."""
    x, y, z = compiled.grid(dims)
    if y > 65535 or z > 65535:
        raise InputError(f"{compiled.entry}: grid ({x}, {y}, {z}) is more than CUDA allows; use a smaller batch")
    return Launch(
        compiled=compiled,
        grid=(x, y, z),
        block=(compiled.threads, 1, 1),
        shared_bytes=compiled.shared_bytes,
        arguments=compiled.parameters,
        scalars={name: int(dims[name]) for name in compiled.kernel.scalars},
    )


def pack(launch: Launch, pointers: Mapping[str, int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(values, ctypes) of the arguments in order, as ``cuLaunchKernel`` of cuda-python takes them.

    Raises:
        InputError: a tensor has no pointer, or one that is not aligned to 16 bytes as the kernel was
        compiled for.
    """
    values: list[int] = []
    types: list[Any] = []
    for name, kind in launch.arguments:
        if kind == "int32":
            values.append(launch.scalars[name])
            types.append(ctypes.c_int32)
            continue
        if name not in pointers:
            raise InputError(f"{launch.compiled.entry} needs the tensor {name}, got {sorted(pointers)}")
        if pointers[name] % 16:
            raise InputError(f"{launch.compiled.entry}: {name} is not aligned to 16 bytes")
        values.append(pointers[name])
        types.append(ctypes.c_void_p)
    return tuple(values), tuple(types)


def run(op: Op, inputs: Sequence[Any], attributes: Mapping[str, int], driver: Driver, target: str) -> Any:
    """Run an op on contiguous torch tensors that the driver's kernels can reach; returns its output tensor.

    Intermediates are allocated with torch; everything goes to torch's current stream.
    """
    import torch

    dtype = str(inputs[0].dtype).removeprefix("torch.")
    dims = op.dims([tuple(x.shape) for x in inputs], attributes)
    tensors: dict[str, Any] = {}
    for schema, value in zip(op.inputs, inputs, strict=True):
        if not value.is_contiguous():
            raise InputError(f"{op.name}: {schema.name} is not contiguous")
        tensors[schema.name] = value
    launches = plan(op, dims, dtype, target)  # type: ignore[arg-type]  # compile_kernel checks it
    device = inputs[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    for launch in launches:
        for schema in launch.compiled.kernel.outputs:
            tensors[schema.name] = _allocate(schema, dims, inputs[0])
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        driver.launch(launch, pack(launch, pointers), stream)
    return tensors[op.outputs[0].name]


def _allocate(schema: Tensor, dims: Dims, like: Any) -> Any:
    import torch

    dtype = getattr(torch, schema.dtype) if schema.dtype else like.dtype
    return like.new_empty(schema.dims(dims), dtype=dtype)


class CudaDriver:
    """The CUDA driver through cuda-python, on torch's current context. Not executed yet: no GPU was at
    hand."""

    def __init__(self) -> None:
        self._cuda = optional_import("cuda.bindings.driver")
        self._functions: dict[str, Any] = {}

    def launch(self, launch: Launch, packed: tuple[tuple[Any, ...], tuple[Any, ...]], stream: int) -> None:
        """Load the PTX on first use, then launch."""
        function = self._function(launch)
        self._check(
            self._cuda.cuLaunchKernel(function, *launch.grid, *launch.block, launch.shared_bytes, stream, packed, 0)
        )

    def _function(self, launch: Launch) -> Any:
        key = launch.compiled.ptx_sha256
        if key not in self._functions:
            module = self._check(self._cuda.cuModuleLoadData(launch.compiled.ptx.encode() + b"\0"))
            function = self._check(self._cuda.cuModuleGetFunction(module, launch.compiled.entry.encode()))
            if launch.shared_bytes > DEFAULT_SHARED_LIMIT:
                attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._check(self._cuda.cuFuncSetAttribute(function, attribute, launch.shared_bytes))
            self._functions[key] = function
        return self._functions[key]

    def _check(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status) != 0:
            raise MachineError(f"the CUDA driver answers {status}")
        return values[0] if values else None
