"""How a ternary weight is stored in an ONNX file, and what multiplies with it.

Every carrier holds the values exactly, and every one is exact in a plain ONNX Runtime session too. That is not a given:
ONNX Runtime fuses ``MatMul(x, DequantizeLinear(w))`` of a matrix into ``MatMulNBits`` with activations rounded to eight
bits (5e-3), unless the session sets ``session.qdq_matmulnbits_accuracy_level``. The graphs below are not fused: INT4 is
dequantised in blocks along the rows before it is transposed, INT8 has a third axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from dexport.errors import InputError
from dexport.exporter.passes.lazy import add_initializer, as_torch, lazily, static_shape
from dexport.exporter.pytorch.module_path import module_path, set_module_path
from dexport.plugins.op import DOMAIN
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL
from dexport.plugins.ternary_matmul.packing import VALUES_PER_BYTE, pack

ONNXRUNTIME_DOMAIN = "com.microsoft"
FLOAT32_ACTIVATIONS = 1
"""``accuracy_level`` of MatMulNBits."""
NBITS_BLOCK = 128
"""Values per scale; smaller ones are up to forty times slower for a single row."""
INT4_BLOCKS = (128, 64, 32, 16)
"""Values per scale, the largest that divides the row: TensorRT's weight-only kernels want 128 or 64."""


@dataclass(frozen=True)
class Layer:
    """One ternary layer of a traced graph: ``Mul(MatMul(x, Transpose(weight)), scale)``.

    ``weight`` is an initializer (out, in), float32 and lazy.
    """

    weight: ir.Value
    transpose: ir.Node
    matmul: ir.Node
    scaled: ir.Node

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def source(self) -> ir.TensorProtocol:
        assert self.weight.const_value is not None
        return self.weight.const_value

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = static_shape(self.source)
        return rows, columns


@dataclass(frozen=True)
class Carrier:
    """One way to store ternary weights.

    Attributes:
        bits: per value in the file; layers of one shape share their scales.
        runs_in: which runtimes take it.
        store: rewrites one layer of a graph.
    """

    name: str
    bits: int
    runs_in: tuple[str, ...]
    store: Callable[[ir.Graph, Layer], None]


def store_packed(graph: ir.Graph, layer: Layer) -> None:
    """``DexTernaryMatMul(x, uint8 (out / 4, in), scale)``: the bytes of a released checkpoint."""
    rows, columns = layer.shape
    if rows % VALUES_PER_BYTE:
        raise InputError(
            f"{layer.name} has {rows} rows, which cannot be packed four to a byte",
            hint="choose --ternary-carrier int8, or --quantize none",
        )
    weight = _stored(graph, layer, pack, ir.DataType.UINT8, (rows // VALUES_PER_BYTE, columns))
    _replace(graph, layer.scaled, TERNARY_MATMUL.name, [layer.matmul.inputs[0], weight, _scale(layer)], domain=DOMAIN)
    _drop(graph, layer.matmul, layer.transpose)


def store_int4(graph: ir.Graph, layer: Layer) -> None:
    """``MatMul(x, Transpose(DequantizeLinear(int4 (out, in))))`` in blocks whose scale is 1."""
    rows, columns = layer.shape
    block = next((size for size in INT4_BLOCKS if columns % size == 0), None)
    if block is None:
        raise InputError(
            f"{layer.name} has {columns} columns, no multiple of {INT4_BLOCKS[-1]}, the smallest block of INT4 weights",
            hint="choose --ternary-carrier int8, or --quantize none",
        )
    weight = _stored(graph, layer, int4_bytes, ir.DataType.INT4, (rows, columns))
    inputs = [weight, _ones(graph, (rows, columns // block))]
    values = _insert(graph, layer.transpose, "DequantizeLinear", inputs, {"axis": 1, "block_size": block})
    layer.transpose.replace_input_with(0, values)


def store_int8(graph: ir.Graph, layer: Layer) -> None:
    """``MatMul(x, DequantizeLinear(int8 (1, in, out)))`` whose scale is 1."""
    rows, columns = layer.shape

    def columns_first(values: Tensor) -> Tensor:
        return values.T[None].contiguous()

    weight = _stored(graph, layer, columns_first, ir.DataType.INT8, (1, columns, rows))
    values = _insert(graph, layer.matmul, "DequantizeLinear", [weight, _ones(graph, ())], {})
    layer.matmul.replace_input_with(1, values)
    _drop(graph, layer.transpose)


def store_nbits(graph: ir.Graph, layer: Layer, bits: int) -> None:
    """``MatMulNBits(x, uint8 (out, blocks, bytes))`` of ONNX Runtime, with activations in float32 and scales of 1."""
    rows, columns = layer.shape
    blocks = -(-columns // NBITS_BLOCK)
    per_byte = 8 // bits

    def blocked(values: Tensor) -> Tensor:
        return nbits_bytes(values, bits, NBITS_BLOCK)

    weight = _stored(graph, layer, blocked, ir.DataType.UINT8, (rows, blocks, NBITS_BLOCK // per_byte))
    inputs = [layer.matmul.inputs[0], weight, _ones(graph, (rows, blocks))]
    attributes = nbits_attributes(rows, columns, bits, NBITS_BLOCK)
    _replace(graph, layer.matmul, "MatMulNBits", inputs, attributes, domain=ONNXRUNTIME_DOMAIN)
    _drop(graph, layer.transpose)


def store_nbits2(graph: ir.Graph, layer: Layer) -> None:
    store_nbits(graph, layer, 2)


def store_nbits4(graph: ir.Graph, layer: Layer) -> None:
    store_nbits(graph, layer, 4)


_EVERYWHERE = ("onnxruntime", "tensorrt", "tensorrt-rtx")
CARRIERS = {
    carrier.name: carrier
    for carrier in (
        Carrier("packed", 2, ("onnxruntime", "tensorrt with plugins"), store_packed),
        Carrier("int4", 4, _EVERYWHERE, store_int4),
        Carrier("int8", 8, _EVERYWHERE, store_int8),
        Carrier("nbits2", 2, ("onnxruntime",), store_nbits2),
        Carrier("nbits4", 4, ("onnxruntime",), store_nbits4),
    )
}


def _stored(
    graph: ir.Graph, layer: Layer, encode: Callable[[Tensor], Tensor], dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """The encoded weight under the name of the dense one, which goes.

    ``encode`` gets the values as int8 (out, in), each time the bytes are wanted.
    """
    source, name = layer.source, layer.name

    def checked(values: Tensor) -> Tensor:
        whole = values.to(torch.int8)
        if whole.min() < -1 or whole.max() > 1 or not torch.equal(whole, values):
            raise InputError(f"{name} holds values that are not ternary", hint="build with --quantize none")
        return encode(whole)

    def packed() -> ir.TensorProtocol:
        return ir.PackedTensor(checked(as_torch(source)).numpy(), dtype, shape=ir.Shape(shape), name=name)

    del graph.initializers[name]
    if dtype == ir.DataType.INT4:
        return add_initializer(graph, ir.LazyTensor(packed, dtype=dtype, shape=ir.Shape(shape), name=name))
    return add_initializer(graph, lazily(source, checked, dtype=dtype, shape=shape, name=name))


def int4_bytes(values: Tensor) -> Tensor:
    """Two's complement, two to a byte, the first in the low half: int8 (out, in) -> uint8 (bytes,)."""
    codes = (values & 15).to(torch.uint8).flatten()
    return _joined(torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(1), 4)


def nbits_bytes(values: Tensor, bits: int, block: int) -> Tensor:
    """What MatMulNBits reads: int8 (out, in) -> uint8 (out, blocks, bytes), the last block filled up with zeros."""
    rows, columns = values.shape
    blocks, zero_point = -(-columns // block), 1 << bits - 1
    codes = torch.full((rows, blocks * block), zero_point, dtype=torch.uint8)
    codes[:, :columns] = (values + zero_point).to(torch.uint8)
    return _joined(codes.view(rows, blocks, -1, 8 // bits).unbind(3), bits)


def nbits_attributes(rows: int, columns: int, bits: int, block: int) -> dict[str, int]:
    """Attributes of a MatMulNBits node that keeps its activations in float32."""
    return {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": FLOAT32_ACTIVATIONS}


def _joined(parts: Sequence[Tensor], bits: int) -> Tensor:
    """Codes side by side in one byte, the first in the lowest bits."""
    result = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        result |= part << bits * index
    return result


def _ones(graph: ir.Graph, shape: tuple[int, ...]) -> ir.Value:
    """Scales of 1 in float32, shared by all layers of a shape."""
    name = "x".join(("scale_1", *map(str, shape)))
    existing = graph.initializers.get(name)
    return existing or add_initializer(graph, ir.Tensor(np.ones(shape, np.float32), name=name))


def _scale(layer: Layer) -> ir.Value | None:
    return next(value for value in layer.scaled.inputs if value is not layer.matmul.outputs[0])


def _insert(
    graph: ir.Graph, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]
) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes)
    set_module_path(node, module_path(before))
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(
    graph: ir.Graph,
    old: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int] | None = None,
    *,
    domain: str,
) -> None:
    """A node of another domain in the place of ``old``, with its type and shape: shape inference knows no such node."""
    graph.opset_imports[domain] = 1
    node = ir.node(op, inputs, attributes=attributes or {}, domain=domain)
    set_module_path(node, module_path(old))
    output = old.outputs[0]
    new = node.outputs[0]
    new.name, new.type, new.shape = output.name, output.type, output.shape
    graph.insert_before(old, node)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _drop(graph: ir.Graph, *nodes: ir.Node) -> None:
    for node in nodes:
        graph.remove(node, safe=True)
