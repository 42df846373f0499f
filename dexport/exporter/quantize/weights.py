"""INT8 weights: symmetric, one scale per output channel, computed one tensor at a time when the file is written."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from dexport.exporter.passes.lazy import add_initializer, lazily, static_shape
from dexport.exporter.passes.precision import TORCH_TYPES
from dexport.exporter.pytorch.module_path import set_module_path
from dexport.exporter.quantize.layers import WEIGHT_INPUT, Layer

LEVELS = 127
"""Largest code. -128 is not used: symmetric codes need no zero point, which TensorRT requires."""
SMALLEST_SCALE = 2.0**-100
"""Of float32 and bfloat16, far inside of their range. A channel of zeros has codes of zero, whatever its scale is; an
engine wants a positive one."""
SMALLEST_HALF_SCALE = 2.0**-20
"""float16 holds it with 4 bits; channels that would need less are as good as zero, and become zero."""


def smallest_scale(stored: torch.dtype) -> float:
    """The smallest scale that is stored in a type."""
    return SMALLEST_HALF_SCALE if stored == torch.float16 else SMALLEST_SCALE


def quantise_weight(graph: ir.Graph, layer: Layer, migrated: Tensor | None = None) -> None:
    """``MatMul(x, W)`` -> ``MatMul(x, DequantizeLinear(W as int8, scale per output channel))``.

    Run it after the precision conversion: scales take the weight's type, and codes are rounded to the stored scales.

    Args:
        migrated: factor (input channels,) that the weight takes over from the activations.
    """
    source = layer.weight.const_value
    assert source is not None
    name, dtype, shape, axis = str(layer.weight.name), source.dtype, static_shape(source), layer.output_axis
    stored = TORCH_TYPES.get(dtype, torch.float32)

    def weight(tensor: Tensor) -> Tensor:
        return tensor.float() if migrated is None else tensor.float() * _along(migrated, len(shape), layer.input_axis)

    def scale(tensor: Tensor) -> Tensor:
        return channel_scale(weight(tensor), axis, smallest_scale(stored)).to(stored)

    def codes(tensor: Tensor) -> Tensor:
        wide = weight(tensor)
        return quantise(wide, _along(scale(tensor).float(), len(shape), axis))

    inputs = [
        add_initializer(graph, lazily(source, codes, dtype=ir.DataType.INT8, shape=shape, name=f"{name}/int8")),
        add_initializer(graph, lazily(source, scale, dtype=dtype, shape=[shape[axis]], name=f"{name}/scale")),
    ]
    node = ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{layer.path}/DequantizeLinear")
    set_module_path(node, layer.path)
    result = node.outputs[0]
    result.name, result.dtype, result.shape = node.name, dtype, ir.Shape(shape)
    graph.insert_before(layer.node, node)
    layer.node.replace_input_with(WEIGHT_INPUT, result)
    if not layer.weight.uses():
        del graph.initializers[name]


def channel_scale(weight: Tensor, axis: int, smallest: float = SMALLEST_SCALE) -> Tensor:
    """Scale of every channel along ``axis``: its largest magnitude becomes code 127."""
    others = [n for n in range(weight.ndim) if n != axis]
    return (weight.abs().amax(others) / LEVELS).clamp_min(smallest)


def quantise(tensor: Tensor, scale: Tensor) -> Tensor:
    """Codes -127..127, rounded half to even as QuantizeLinear does."""
    return (tensor / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def _along(vector: Tensor, rank: int, axis: int) -> Tensor:
    """The vector in a shape that broadcasts along ``axis``."""
    return vector.reshape([-1 if n == axis else 1 for n in range(rank)])
