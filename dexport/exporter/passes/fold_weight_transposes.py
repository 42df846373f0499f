"""Store a weight the way it is used: Transpose of an initializer becomes a lazily transposed initializer."""

from __future__ import annotations

import onnx_ir as ir

from dexport.exporter.passes.lazy import add_initializer, lazily

SUFFIX = ".T"


class FoldWeightTransposes(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(W))`` -> ``MatMul(x, W.T)`` for every transposed initializer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for node in list(graph):
            weight = node.inputs[0] if node.inputs else None
            if node.op_type != "Transpose" or weight is None or not weight.is_initializer():
                continue
            source = weight.const_value
            if source is None or not all(isinstance(dim, int) for dim in source.shape):
                continue
            permutation = node.attributes.get_ints("perm", tuple(reversed(range(len(source.shape)))))
            name = f"{weight.name}{SUFFIX}"
            if tuple(permutation) != tuple(reversed(range(len(source.shape)))):
                name += "".join(map(str, permutation))
            folded = graph.initializers.get(name) or add_initializer(
                graph,
                lazily(
                    source,
                    lambda weight, permutation=permutation: weight.permute(*permutation).contiguous(),
                    dtype=source.dtype,
                    shape=[int(source.shape[axis]) for axis in permutation],
                    name=name,
                ),
            )
            node.outputs[0].replace_all_uses_with(folded)
            graph.remove(node, safe=True)
            if not weight.uses() and weight not in graph.outputs:
                del graph.initializers[str(weight.name)]
            modified = True
        return ir.passes.PassResult(model, modified)
