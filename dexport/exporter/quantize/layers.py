"""Which layers of a graph are quantised: linear layers and dense convolutions whose weight is stored."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from dexport.exporter.module_path import inside, module_path

WEIGHT = ".weight"
WEIGHT_INPUT = 1


@dataclass(frozen=True)
class Layer:
    """A quantisable node.

    Attributes:
        path: module path, such as ``blocks.3.attn.qkv``.
        weight: its stored weight.
        output_axis, input_axis: axes of the weight that count output and input channels.
    """

    path: str
    node: ir.Node
    weight: ir.Value
    output_axis: int
    input_axis: int


def quantisable_layers(model: ir.Model, exclude: Collection[str]) -> list[Layer]:
    """MatMul, Gemm and dense Conv nodes with a weight of their own, in graph order.

    A weight counts as a module's own when it carries the module's name; a depthwise convolution is left alone, as it
    has little to compute and every channel has a range of its own.

    Args:
        exclude: glob patterns of module paths.
    """
    return [
        layer
        for node in model.graph
        if (layer := _layer(node)) and not any(inside(layer.path, pattern) for pattern in exclude)
    ]


def _layer(node: ir.Node) -> Layer | None:
    axes = _weight_axes(node)
    weight = node.inputs[WEIGHT_INPUT] if axes else None
    path = module_path(node)
    if axes is None or weight is None or not weight.is_initializer() or not str(weight.name).startswith(path + WEIGHT):
        return None
    return Layer(path, node, weight, *axes)


def _weight_axes(node: ir.Node) -> tuple[int, int] | None:
    """(output axis, input axis) of the weight; None for a node that is not quantised."""
    match node.op_type:
        case "MatMul":
            return 1, 0
        case "Gemm":
            return (0, 1) if node.attributes.get_int("transB", 0) else (1, 0)
        case "Conv" if node.attributes.get_int("group", 1) == 1:
            return 0, 1
    return None
