"""What dexport knows about one custom op, and about the kernels that compute it.

This file and the op definitions import neither torch, onnx, triton nor TensorRT: what needs them is named by
its import path and imported when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dexport.errors import InputError
from dexport.optional import optional_import

DOMAIN = "dexport"

Dims = Mapping[str, Any]
"""Sizes by name. All are integers, except that the batch ``B`` may be a symbolic expression of TensorRT."""

Shape = Sequence[Any]
DType = Literal["float16", "bfloat16", "float32"]
DTYPES: tuple[DType, ...] = ("float16", "bfloat16", "float32")
FixedType = DType | Literal["uint8"]
"""What a tensor's own type may be; uint8 holds packed weights."""
TRITON_TYPES: Mapping[FixedType, str] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "uint8": "u8"}


@dataclass(frozen=True)
class Tensor:
    """An input, intermediate or output: ``shape`` holds keys of :data:`Dims` or integers.

    ``dtype`` is None for the op's own type (float16, bfloat16 or float32), else a fixed one.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: FixedType | None = None

    def dims(self, dims: Dims) -> tuple[Any, ...]:
        """The shape with its names filled in."""
        return tuple(dims[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class Attribute:
    """An attribute of the ONNX node; all are required integers."""

    name: str
    meaning: str


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one compiled variant.

    Attributes:
        blocks: constants such as ``BLOCK_M``.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel. Its parameters are, in this order: inputs, scalars (int32), outputs, then constants.

    TensorRT passes the arguments of an ahead-of-time plugin in that order.

    Attributes:
        name: the Triton function and the PTX entry.
        module: where the Triton function lives.
        scalars: keys of :data:`Dims` passed at run time.
        constants: ``(dims, dtype) -> constants`` that are compiled in, block sizes excepted.
        grid: ``(dims, blocks) -> (x, y, z)``; uses only ``+ - * //``, so that ``B`` may be symbolic.
        fits: whether the kernel can serve these sizes in this type.
    """

    name: str
    module: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    constants: Callable[[Dims, DType], Mapping[str, int | float | str]]
    grid: Callable[[Dims, Mapping[str, int]], tuple[Any, Any, Any]]
    scalars: tuple[str, ...] = ()
    fits: Callable[[Dims, DType], bool] = field(default=lambda _dims, _dtype: True)

    def function(self) -> Any:
        """The Triton function; a :class:`~dexport.errors.MachineError` names the extra when triton is
        missing."""
        optional_import("triton")
        return resolve(f"{self.module}:{self.name}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.inputs, *self.outputs)


@dataclass(frozen=True)
class Op:
    """One custom op: an ONNX node of the domain ``dexport`` with its model-local function.

    Attributes:
        name: ONNX operator and function name, and TensorRT plugin name.
        inputs, outputs, attributes: the schema.
        measure: ``(input shapes, attributes) -> dims``; does not check shapes.
        reference: ``module:function`` of the PyTorch reference, which takes the inputs, then the attributes
        by name. body: ``module:function`` that returns the text of the ONNX function.
        kernels: the steps of the op, run one after the other.
        fused: one kernel that does the whole op, for sizes that it fits.
        plugin: the kernel that TensorRT gets: an ahead-of-time plugin is one kernel. None where the op's
        parts
            are plugins instead.
        parts: names of the ops whose nodes the body contains.
        version: of the plugin and, in its metadata, of the function; a change of meaning raises it.
    """

    name: str
    summary: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    measure: Callable[[Sequence[Shape], Mapping[str, int]], Dims]
    reference: str
    body: str
    kernels: tuple[Kernel, ...]
    fused: Kernel | None = None
    plugin: Kernel | None = None
    parts: tuple[str, ...] = ()
    version: int = 1

    def dims(self, shapes: Sequence[Shape], attributes: Mapping[str, int]) -> Dims:
        """Sizes of one call, checked.

        Raises:
            InputError: wrong number of inputs, missing attribute, or a shape that the schema does not allow.
        """
        names = [attribute.name for attribute in self.attributes]
        if sorted(attributes) != sorted(names):
            raise InputError(f"{self.name} takes the attributes {names}, got {sorted(attributes)}")
        if len(shapes) != len(self.inputs):
            raise InputError(f"{self.name} takes {len(self.inputs)} inputs, got {len(shapes)}")
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.shape):
                raise InputError(f"{self.name}: {tensor.name} has shape {tuple(shape)}, expected {tensor.shape}")
        dims = self.measure(shapes, attributes)
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            expected = tensor.dims(dims)
            if any(_differ(a, b) for a, b in zip(shape, expected, strict=True)):
                raise InputError(
                    f"{self.name}: {tensor.name} has shape {tuple(shape)}, expected {tensor.shape} = {expected}"
                )
        return dims

    def all_kernels(self) -> tuple[Kernel, ...]:
        """Every kernel that this op may run, once."""
        return tuple(dict.fromkeys(k for k in (*self.kernels, self.fused, self.plugin) if k is not None))

    def plan(self, dims: Dims, dtype: DType) -> tuple[Kernel, ...]:
        """The kernels to run for these sizes, in order: the fused one where it fits, else the steps."""
        return (self.fused,) if self.fused is not None and self.fused.fits(dims, dtype) else self.kernels


def resolve(path: str) -> Any:
    """The object at ``module:name``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def cdiv(a: Any, b: int) -> Any:
    """Ceiling division that symbolic expressions understand."""
    return (a + (b - 1)) // b


def split_head(size: int) -> tuple[int, int]:
    """Cover a head of ``size`` columns by a power of two and a power-of-two rest of at least 16, which may
    be 0.

    Triton's blocks are powers of two: 72 columns as 64 + 16 cost 80, as one block they would cost 128.
    """
    whole = max(16, 1 << (size - 1).bit_length())
    main = max(16, 1 << (size.bit_length() - 1))
    if main >= size:
        return main, 0
    rest = max(16, 1 << (size - main - 1).bit_length())
    return (main, rest) if main + rest < whole else (whole, 0)


def _differ(a: Any, b: Any) -> bool:
    """Whether two sizes are known to differ; symbolic ones are not compared."""
    return isinstance(a, int) and isinstance(b, int) and a != b
