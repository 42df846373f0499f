"""INT8 activations: a static Q/DQ pair in front of a layer, and behind a convolution larger than 1x1.

Codes are signed and symmetric, one scale per tensor: TensorRT takes no zero point, and ONNX Runtime multiplies signed
codes as fast as unsigned ones (3.24 and 3.28 times float32 on AVX512-VNNI, where neither saturates; elsewhere see
:mod:`dexport.runtime.int8_products`). Ranges found anew
for every call (DynamicQuantizeLinear) reach 3.6 times, but TensorRT has no such operator.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dexport.exporter.passes.lazy import add_initializer, lazily, static_shape
from dexport.exporter.pytorch.module_path import set_module_path
from dexport.exporter.quantize.layers import Layer
from dexport.exporter.quantize.weights import LEVELS, SMALLEST_HALF_SCALE

ZERO_POINT = "int8/zero_point"
BIAS_INPUT = 2


INPUT, OUTPUT = "input", "output"
NAMES = {INPUT: ("QuantizeLinear", "DequantizeLinear_1"), OUTPUT: ("QuantizeLinear_1", "DequantizeLinear_2")}
"""The pair's names below the module path; the weight's is plain ``DequantizeLinear``."""


def quantise_value(
    graph: ir.Graph, value: ir.Value, threshold: float, path: str, role: str, before: ir.Node
) -> ir.Value:
    """``DequantizeLinear(QuantizeLinear(value))``, inserted in front of the node ``before``.

    Args:
        threshold: magnitude of code 127; larger values saturate.
        path: module path that the new nodes carry.
        role: what the value is to the module, ``input`` or ``output``.
    """
    dtype = value.dtype
    assert dtype is not None
    # Inputs that were zero all along a calibration, or nearly so, get the smallest step of the narrowest type.
    step = np.asarray(max(threshold / LEVELS, SMALLEST_HALF_SCALE), dtype.numpy())
    scale = add_initializer(graph, ir.Tensor(step, dtype=dtype, name=f"{path}/{role}_scale"))
    zero = graph.initializers.get(ZERO_POINT) or add_initializer(graph, ir.tensor(np.int8(0), name=ZERO_POINT))
    for name, result_type in zip(NAMES[role], (ir.DataType.INT8, dtype), strict=True):
        node = ir.node(name.partition("_")[0], [value, scale, zero], name=f"{path}/{name}")
        set_module_path(node, path)
        result = node.outputs[0]
        result.name, result.dtype, result.shape = node.name, result_type, value.shape
        graph.insert_before(before, node)
        value = result
    return value


def quantise_input(graph: ir.Graph, layer: Layer, threshold: float) -> None:
    """Let a layer read its input in int8."""
    value = layer.node.inputs[0]
    assert value is not None
    layer.node.replace_input_with(0, quantise_value(graph, value, threshold, layer.path, INPUT, before=layer.node))


def quantise_output(graph: ir.Graph, layer: Layer, threshold: float) -> None:
    """Let a convolution write its output in int8, and add its bias afterwards in floating point.

    ONNX Runtime has integer convolutions only from int8 to int8, and TensorRT reads no quantised bias. A bias of zeros
    is added as well: ONNX Runtime 1.31 builds an invalid graph where a DequantizeLinear from int8 meets a Reshape.
    """
    old, output = layer.node, layer.node.outputs[0]
    conv = ir.node("Conv", old.inputs[:BIAS_INPUT], attributes=old.attributes, name=old.name)
    set_module_path(conv, layer.path)
    graph.insert_before(old, conv)
    result = conv.outputs[0]
    result.name, result.type, result.shape = f"{layer.path}/Conv", output.type, output.shape
    result = quantise_value(graph, result, threshold, layer.path, OUTPUT, before=old)
    bias = old.inputs[BIAS_INPUT] if len(old.inputs) > BIAS_INPUT else None
    if bias is not None:
        result = _add_bias(graph, layer.path, result, bias, before=old)
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    if result in graph.outputs:
        result.name = output.name
    graph.remove(old, safe=True)
    if bias is not None and not bias.uses():
        del graph.initializers[str(bias.name)]


def _add_bias(graph: ir.Graph, path: str, value: ir.Value, bias: ir.Value, before: ir.Node) -> ir.Value:
    source = bias.const_value
    assert source is not None
    shape = (*static_shape(source), 1, 1)
    column = lazily(source, lambda t: t.reshape(shape), dtype=source.dtype, shape=shape, name=f"{bias.name}/column")
    node = ir.node("Add", [value, add_initializer(graph, column)], name=f"{path}/Add")
    set_module_path(node, path)
    result = node.outputs[0]
    result.name, result.type, result.shape = node.name, value.type, value.shape
    graph.insert_before(before, node)
    return result
