"""Layers of a graph whose weight was rounded to INT4 or ternary: what is stored, and what multiplies with it.

The carriers are those of ternary networks (:mod:`dexport.exporter.quantize.carriers`), with scales: per output channel
for ternary weights, per block for INT4. They run after the precision conversion; scales have the weight's type. Nothing
is read before the file is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from dexport.exporter.passes.lazy import add_initializer
from dexport.exporter.passes.precision import TORCH_TYPES
from dexport.exporter.pytorch.module_path import set_module_path
from dexport.exporter.quantize.carriers import (
    ONNXRUNTIME_DOMAIN,
    int4_bytes,
    nbits_attributes,
    nbits_bytes,
)
from dexport.exporter.quantize.gptq import Rounded, int4_block, spread
from dexport.exporter.quantize.layers import WEIGHT_INPUT, Layer
from dexport.exporter.quantize.schemes import INT4
from dexport.exporter.quantize.weights import smallest_scale
from dexport.plugins.op import DOMAIN
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL
from dexport.plugins.ternary_matmul.packing import VALUES_PER_BYTE, pack

NBITS_BLOCKS = (16, 32, 64, 128)
"""What MatMulNBits takes."""


@dataclass(frozen=True)
class LowBits:
    """The weight of one layer.

    Attributes:
        scheme: ``int4`` or ``ternary``.
        rows, columns: output and input channels.
        read: gives codes and scales, each time bytes are wanted.
    """

    layer: Layer
    scheme: str
    rows: int
    columns: int
    read: Callable[[], Rounded]

    @property
    def block(self) -> int:
        return int4_block(self.columns) if self.scheme == INT4 else self.columns

    @property
    def dtype(self) -> ir.DataType:
        """Of the scales: what the layer computes in."""
        assert self.layer.weight.dtype is not None
        return self.layer.weight.dtype

    def scales(self, function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """A function of the scales (rows, blocks), in their stored type."""
        return lambda: function(self.rounded().scales).to(self._stored).contiguous()

    def rounded(self) -> Rounded:
        """Codes and scales that the stored type can hold: a scale below its smallest one is that, and its codes are
        zero."""
        found, smallest = self.read(), smallest_scale(self._stored)
        lost = spread(found.scales < smallest, found.block, self.columns)
        return Rounded(found.codes.masked_fill(lost, 0), found.scales.clamp_min(smallest), found.block)

    @property
    def _stored(self) -> torch.dtype:
        return TORCH_TYPES.get(self.dtype, torch.float32)


def store_low_bits(graph: ir.Graph, weight: LowBits, carrier: str) -> None:
    """Replace the floating-point weight of a layer by a rounded one."""
    STORE[carrier](graph, weight)
    if not weight.layer.weight.uses():
        del graph.initializers[str(weight.layer.weight.name)]


def carrier_of(rows: int, carrier: str) -> str:
    """The carrier of one layer: rows that cannot be packed four to a byte get two bits of MatMulNBits instead."""
    return "nbits2" if carrier == "packed" and rows % VALUES_PER_BYTE else carrier


def _store_int4(graph: ir.Graph, weight: LowBits) -> None:
    """``MatMul(x, Transpose(DequantizeLinear(int4 (out, in), scales)))``: ONNX Runtime fuses a DequantizeLinear that
    meets the product directly, and rounds the activations to eight bits then."""
    block = int4_block(weight.columns)
    blocks = -(-weight.columns // block)
    shape = (weight.rows, weight.columns)

    def per_block(scales: Tensor) -> Tensor:
        return scales.expand(weight.rows, blocks)

    def packed() -> ir.TensorProtocol:
        return ir.PackedTensor(int4_bytes(weight.rounded().codes).numpy(), ir.DataType.INT4, shape=ir.Shape(shape))

    name = f"{weight.layer.weight.name}/int4"
    codes = add_initializer(graph, ir.LazyTensor(packed, dtype=ir.DataType.INT4, shape=ir.Shape(shape), name=name))
    scales = _initializer(graph, weight, "scale", weight.scales(per_block), weight.dtype, (weight.rows, blocks))
    attributes = {"axis": 1, "block_size": min(block, weight.columns)}
    node = ir.node("DequantizeLinear", [codes, scales], attributes=attributes)
    values = _insert(graph, weight, node, "DequantizeLinear", shape)
    if weight.layer.output_axis == 1:
        node = ir.node("Transpose", [values], attributes={"perm": [1, 0]})
        values = _insert(graph, weight, node, "Transpose_2", shape[::-1])
    weight.layer.node.replace_input_with(WEIGHT_INPUT, values)


def _store_int8(graph: ir.Graph, weight: LowBits) -> None:
    """``MatMul(x, DequantizeLinear(int8 (1, in, out), scale per output channel))``; of a Gemm, int8 (out, in)."""
    matrix = weight.layer.node.op_type == "Gemm"
    first = weight.layer.output_axis == 0
    leading = () if matrix else (1,)
    shape = (*leading, *((weight.rows, weight.columns) if first else (weight.columns, weight.rows)))

    def codes() -> Tensor:
        values = weight.rounded().codes
        return (values if first else values.T).reshape(shape).contiguous()

    inputs = [
        _initializer(graph, weight, "int8", codes, ir.DataType.INT8, shape),
        _initializer(graph, weight, "scale", weight.scales(torch.flatten), weight.dtype, (weight.rows,)),
    ]
    attributes = {"axis": len(leading) + weight.layer.output_axis}
    node = ir.node("DequantizeLinear", inputs, attributes=attributes)
    values = _insert(graph, weight, node, "DequantizeLinear", shape)
    weight.layer.node.replace_input_with(WEIGHT_INPUT, values)


def _store_nbits(bits: int) -> Callable[[ir.Graph, LowBits], None]:
    """``MatMulNBits(x, uint8 (out, blocks, bytes), scales)`` of ONNX Runtime, with activations in float32."""

    def store(graph: ir.Graph, weight: LowBits) -> None:
        block = weight.block if weight.block in NBITS_BLOCKS else NBITS_BLOCKS[-1]
        blocks = -(-weight.columns // block)

        def scales(found: Tensor) -> Tensor:
            return found.expand(weight.rows, blocks)

        def codes() -> Tensor:
            return nbits_bytes(weight.rounded().codes, bits, block)

        inputs = [
            weight.layer.node.inputs[0],
            _initializer(graph, weight, "nbits", codes, ir.DataType.UINT8, (weight.rows, blocks, block * bits // 8)),
            _initializer(graph, weight, "scale", weight.scales(scales), weight.dtype, (weight.rows, blocks)),
        ]
        attributes = nbits_attributes(weight.rows, weight.columns, bits, block)
        graph.opset_imports[ONNXRUNTIME_DOMAIN] = 1
        node = ir.node("MatMulNBits", inputs, attributes=attributes, domain=ONNXRUNTIME_DOMAIN)
        _replace(graph, weight, _insert(graph, weight, node, "MatMulNBits", _output_shape(weight)))

    return store


def _store_packed(graph: ir.Graph, weight: LowBits) -> None:
    """``DexTernaryMatMul(x, uint8 (out / 4, in), mean scale) * (scale of the channel / mean scale)``.

    The op has one scale, as ternary networks have. With the mean in there, products that are rounded to half precision
    in between have the magnitude of the result.
    """
    x = weight.layer.node.inputs[0]
    assert x is not None and x.shape is not None
    rank, outer = len(x.shape), _output_shape(weight)

    def reshaped(value: ir.Value, name: str, target: Sequence[int], shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        sizes = add_initializer(
            graph, ir.tensor(np.asarray(target, np.int64), name=f"{weight.layer.path}/{name}_shape")
        )
        return _insert(graph, weight, ir.node("Reshape", [value, sizes]), name, shape)

    if rank != 3:
        x = reshaped(x, "Reshape", (0, -1, weight.columns), (x.shape[0], _tokens(x.shape), weight.columns))
    assert x.shape is not None
    shape = (weight.rows // VALUES_PER_BYTE, weight.columns)
    inputs = [
        x,
        _initializer(graph, weight, "packed", lambda: pack(weight.rounded().codes), ir.DataType.UINT8, shape),
        _initializer(graph, weight, "mean_scale", weight.scales(_mean), weight.dtype, (1,)),
    ]
    graph.opset_imports[DOMAIN] = 1
    node = ir.node(TERNARY_MATMUL.name, inputs, domain=DOMAIN)
    value = _insert(graph, weight, node, TERNARY_MATMUL.name, (*x.shape[:2], weight.rows))
    relative = _initializer(graph, weight, "scale", weight.scales(_relative), weight.dtype, (weight.rows,))
    value = _insert(graph, weight, ir.node("Mul", [value, relative]), "Mul", (*x.shape[:2], weight.rows))
    if rank != 3:
        target = (0, *(dim for dim in outer[1:] if isinstance(dim, int)))
        value = reshaped(value, "Reshape_1", target, outer)
    _replace(graph, weight, value)


def _mean(scales: Tensor) -> Tensor:
    return scales.mean().reshape(1)


def _relative(scales: Tensor) -> Tensor:
    return (scales / scales.mean()).flatten()


def _tokens(shape: ir.Shape) -> int:
    return math.prod(dim for dim in list(shape)[1:-1] if isinstance(dim, int))


STORE: dict[str, Callable[[ir.Graph, LowBits], None]] = {
    "packed": _store_packed,
    "int4": _store_int4,
    "int8": _store_int8,
    "nbits2": _store_nbits(2),
    "nbits4": _store_nbits(4),
}


def _initializer(
    graph: ir.Graph,
    weight: LowBits,
    suffix: str,
    function: Callable[[], Tensor],
    dtype: ir.DataType,
    shape: Sequence[int],
) -> ir.Value:
    name = f"{weight.layer.weight.name}/{suffix}"

    def compute() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(function(), name=name)

    return add_initializer(graph, ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name))


def _insert(
    graph: ir.Graph, weight: LowBits, node: ir.Node, name: str, shape: Sequence[int | ir.SymbolicDim]
) -> ir.Value:
    """Put a node in front of the layer's own; its output has the layer's type."""
    node.name = f"{weight.layer.path}/{name}"
    set_module_path(node, weight.layer.path)
    value = node.outputs[0]
    value.name, value.dtype, value.shape = node.name, weight.dtype, ir.Shape(shape)
    graph.insert_before(weight.layer.node, node)
    return value


def _output_shape(weight: LowBits) -> tuple[int | ir.SymbolicDim, ...]:
    shape = weight.layer.node.outputs[0].shape
    assert shape is not None
    return tuple(shape)


def _replace(graph: ir.Graph, weight: LowBits, value: ir.Value) -> None:
    """Let everything read ``value``, a product without bias, in place of what the layer's node returned."""
    old = weight.layer.node
    output = old.outputs[0]
    if old.op_type == "Gemm" and len(old.inputs) > 2 and old.inputs[2] is not None:
        value = _insert(graph, weight, ir.node("Add", [value, old.inputs[2]]), "Add", _output_shape(weight))
    name = output.name
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    if value in graph.outputs:
        value.name = name
