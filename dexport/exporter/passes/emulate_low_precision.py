"""Turn a low-precision graph into a float32 one that rounds as a GPU would.

ONNX Runtime on a CPU has no bfloat16 kernels, and runs float16 nodes in float32 without rounding in between, so that
neither rounding nor overflow of the activations shows. Here every value that would be stored in low precision is cast
down and up again; inside one operator arithmetic is float32, as it accumulates on tensor cores.
"""

from __future__ import annotations

import onnx_ir as ir

from dexport.exporter.passes.precision import DATA_MOVEMENT, TORCH_TYPES


class EmulateLowPrecision(ir.passes.InPlacePass):
    """Needs an executor that keeps a cast which loses precision; ONNX Runtime does."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = list(graph)
        wide: dict[ir.Value, ir.Value] = {}
        """Low-precision value -> the same value in float32."""
        for weight in list(graph.initializers.values()):
            if weight.dtype in TORCH_TYPES:
                wide[weight] = _cast(weight, ir.DataType.FLOAT)
                graph.insert_before(nodes[0], _producer(wide[weight]))
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value in wide:
                    node.replace_input_with(index, wide[value])
            for output in node.outputs:
                if output.dtype in TORCH_TYPES:
                    wide[output] = self._compute_wide(graph, node, output)
        return ir.passes.PassResult(model, modified=bool(wide))

    def _compute_wide(self, graph: ir.Graph, node: ir.Node, output: ir.Value) -> ir.Value:
        """Make a low-precision output float32, rounded unless the node only moves values that are rounded already."""
        low = output.dtype
        assert low is not None
        if node.op_type == "Cast":
            widened = _cast(output, ir.DataType.FLOAT)
            graph.insert_after(node, _producer(widened))
            return widened
        output.dtype = ir.DataType.FLOAT
        # An integer kernel applies the scale to its int32 sum: codes times scale are never stored.
        if node.op_type in DATA_MOVEMENT or node.op_type == "DequantizeLinear":
            return output
        rounded = _cast(output, low)
        widened = _cast(rounded, ir.DataType.FLOAT)
        graph.insert_after(node, [_producer(rounded), _producer(widened)])
        return widened


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    name = f"{value.name}/as_{dtype.name.lower()}"
    result = ir.node("Cast", [value], attributes={"to": dtype}, name=name).outputs[0]
    result.name, result.dtype, result.shape = name, dtype, value.shape
    return result


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
