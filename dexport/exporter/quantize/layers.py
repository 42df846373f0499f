"""Which layers are quantised: linear layers and dense convolutions whose weight is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dexport.exporter.pytorch.module_path import module_path
from dexport.exporter.variant import Variant
from dexport.graphs.terdit import TernaryLinear

WEIGHT = ".weight"
WEIGHT_INPUT = 1
EXAMPLE_BATCH = 2


@dataclass(frozen=True)
class NetworkLayer:
    """A layer of the PyTorch network.

    Attributes:
        shape: of its weight: (out, in), and the kernel's for a convolution.
        convolution: whether it is still a convolution in the graph; those of 1x1 become matrix products.
    """

    shape: tuple[int, ...]
    convolution: bool

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Values per output channel."""
        return self.values // self.rows


NetworkLayers = Mapping[str, NetworkLayer]
"""Module path -> layer, in the order of the network's modules."""


@dataclass(frozen=True)
class Layer:
    """A quantisable node of a graph.

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


def is_quantisable(module: nn.Module) -> bool:
    """A depthwise convolution is left alone: it has little to compute and every channel has a range of its own."""
    return isinstance(module, (nn.Linear, TernaryLinear)) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def stays_convolution(module: nn.Module) -> bool:
    """Whether :class:`~dexport.exporter.passes.pointwise_conv.PointwiseConvToMatMul` leaves it as it is."""
    return isinstance(module, nn.Conv2d) and not (
        set(module.kernel_size) == set(module.stride) == {1} and not any(module.padding)
    )


def network_layers(variant: Variant, *, ternary: bool = True) -> dict[str, NetworkLayer]:
    """The layers that a forward pass really calls; a custom op reads weights of modules that are not called.

    Args:
        ternary: whether layers that are ternary by construction count.
    """
    called: set[str] = set()
    with FakeTensorMode():
        network = variant.module()
        layers = {
            path: module
            for path, module in network.named_modules()
            if is_quantisable(module) and (ternary or not isinstance(module, TernaryLinear))
        }
        for path, module in layers.items():
            module.register_forward_pre_hook(lambda _module, _inputs, path=path: called.add(path))
        for each in variant.each:
            inputs = each.signature.inputs
            graph = each.wrap(network)
            graph(*(torch.zeros(s.dims(EXAMPLE_BATCH), dtype=getattr(torch, s.dtype)) for s in inputs))
    return {
        path: NetworkLayer(tuple(module.weight.shape), stays_convolution(module))
        for path, module in layers.items()
        if path in called
    }


def graph_layers(model: ir.Model) -> dict[str, Layer]:
    """MatMul, Gemm and dense Conv nodes with a weight of their own by module path, in graph order.

    A weight counts as a module's own when it carries the module's name.
    """
    return {layer.path: layer for node in model.graph if (layer := _layer(node))}


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
