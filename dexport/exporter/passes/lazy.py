"""Weights as lazy functions of other weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor


def lazily(
    source: ir.TensorProtocol,
    function: Callable[[Tensor], Tensor],
    *,
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
) -> ir.LazyTensor:
    """``function`` of a tensor's values, computed each time the bytes are wanted and never kept."""

    def compute() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(function(as_torch(source)), name=name)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name)


def as_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The values as a torch tensor, without a copy where the layout allows it."""
    if isinstance(tensor, ir.LazyTensor):
        return as_torch(tensor.raw())
    if isinstance(tensor, tensor_adapters.TorchTensor):
        return tensor.raw
    array = tensor.numpy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def static_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape as integers; a tensor with values has no symbolic dimension."""
    return tuple(int(dim) for dim in tensor.shape if isinstance(dim, int))


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor under its own name."""
    shape = ir.Shape(static_shape(tensor))
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
