"""Store a weight the way it is used: Transpose of an initializer becomes a lazily transposed initializer."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from dexport.exporter.passes.lazy import add_initializer, lazily, static_shape

SUFFIX = ".T"


class FoldWeightTransposes(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(W))`` -> ``MatMul(x, W.T)`` for every transposed initializer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is not None and weight.is_initializer() and weight.const_value is not None:
                self._fold(model.graph, node, weight, weight.const_value)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _fold(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, source: ir.TensorProtocol) -> None:
        shape = static_shape(source)
        reverse = tuple(reversed(range(len(shape))))
        permutation = tuple(node.attributes.get_ints("perm", reverse))
        name = f"{weight.name}{SUFFIX}" + ("" if permutation == reverse else "".join(map(str, permutation)))

        def transposed(tensor: Tensor) -> Tensor:
            return tensor.permute(*permutation)  # a view: what is converted next is half the size to move

        folded = graph.initializers.get(name) or add_initializer(
            graph,
            lazily(source, transposed, dtype=source.dtype, shape=[shape[axis] for axis in permutation], name=name),
        )
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)
        if not weight.uses() and weight not in graph.outputs:
            del graph.initializers[str(weight.name)]
