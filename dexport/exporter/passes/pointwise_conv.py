"""Write 1x1 convolutions as matrix products over the channels, for which runtimes have integer kernels everywhere."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from dexport.exporter.passes.lazy import add_initializer, lazily, static_shape
from dexport.exporter.pytorch.module_path import module_path, set_module_path

CHANNELS_LAST = (0, 2, 3, 1)
CHANNELS_FIRST = (0, 3, 1, 2)


class PointwiseConvToMatMul(ir.passes.InPlacePass):
    """``Conv(x, W (N,C,1,1), b)`` -> ``Transpose(Add(MatMul(Transpose(x), W (C,N)), b))``.

    ONNX Runtime runs an integer Conv only between quantised inputs and quantised outputs, and a MatMul also when its
    output stays in floating point. The transposes meet those of channel norms and of neighbours, and cancel there.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Conv" and _is_pointwise(node):
                self._rewrite(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        output, path = node.outputs[0], module_path(node)
        assert x is not None and weight is not None and weight.const_value is not None
        rows, columns = static_shape(weight.const_value)[:2]
        source, name = weight.const_value, f"{weight.name}.T"
        matrix = graph.initializers.get(name) or add_initializer(
            graph, lazily(source, _transposed, dtype=source.dtype, shape=(columns, rows), name=name)
        )

        def insert(new: ir.Node, name: str, shape: ir.Shape | None) -> ir.Value:
            new.name = f"{path}/{name}"
            set_module_path(new, path)
            result = new.outputs[0]
            result.name, result.dtype, result.shape = new.name, source.dtype, shape
            graph.insert_before(node, new)
            return result

        first, last = {"perm": CHANNELS_LAST}, {"perm": CHANNELS_FIRST}
        value = insert(ir.node("Transpose", [x], attributes=first), "Transpose", _permuted(x.shape))
        value = insert(ir.node("MatMul", [value, matrix]), "MatMul", _permuted(output.shape))
        if bias and bias[0] is not None:
            value = insert(ir.node("Add", [value, bias[0]]), "Add", _permuted(output.shape))
        value = insert(ir.node("Transpose", [value], attributes=last), "Transpose_1", output.shape)
        if output in graph.outputs:
            value.name = output.name
        ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[str(weight.name)]


def _is_pointwise(node: ir.Node) -> bool:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return False
    return (
        static_shape(weight.const_value)[2:] == (1, 1)
        and node.attributes.get_int("group", 1) == 1
        and set(node.attributes.get_ints("strides", (1, 1))) == {1}
        and not any(node.attributes.get_ints("pads", ()))
    )


def _transposed(weight: Tensor) -> Tensor:
    return weight.flatten(1).T.contiguous()


def _permuted(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[axis] for axis in CHANNELS_LAST])
