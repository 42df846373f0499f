"""Replace a computed Reshape target by a constant when at most one dimension of the result is symbolic."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from dexport.exporter.passes.lazy import add_initializer

TARGET = "reshape_to_"


class StaticReshape(ir.passes.InPlacePass):
    """``Reshape(x, Concat(Shape(..), ..))`` -> ``Reshape(x, [-1, 16, 72])``.

    The traced shape of the output is what the target evaluates to, so it may stand in for it; -1 takes the place of
    the one symbolic dimension.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type == "Reshape" and node.domain == "":
                modified |= self._make_static(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _make_static(self, graph: ir.Graph, node: ir.Node) -> bool:
        target, shape = node.inputs[1], node.outputs[0].shape
        if target is None or shape is None or sum(not isinstance(dim, int) for dim in shape) > 1:
            return False
        if shape.is_static() and ir.convenience.get_const_tensor(target) is not None:
            return False
        node.replace_input_with(1, reshape_target(graph, shape))
        node.attributes.pop("allowzero", None)
        return True


def reshape_target(graph: ir.Graph, shape: Iterable[int | ir.SymbolicDim]) -> ir.Value:
    """A constant Reshape target, one for every shape of a graph; at most one dimension is symbolic."""
    dims = [dim if isinstance(dim, int) else -1 for dim in shape]
    name = TARGET + "x".join("B" if dim == -1 else str(dim) for dim in dims)
    while (known := graph.initializers.get(name)) is not None and not _holds(known, dims):
        name += "_"  # a weight of the network's is called so
    return known or add_initializer(graph, ir.Tensor(np.array(dims), name=name))


def _holds(value: ir.Value, dims: list[int]) -> bool:
    constant = value.const_value
    return isinstance(constant, ir.Tensor) and constant.dtype == ir.DataType.INT64 and list(constant.numpy()) == dims
