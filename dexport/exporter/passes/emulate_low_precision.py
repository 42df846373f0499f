"""Turn a low-precision graph into a float32 one that rounds as a GPU would.

ONNX Runtime on a CPU has no bfloat16 kernels, and runs float16 nodes in float32 without rounding in between, so that
neither rounding nor overflow of the activations shows. Here every value that would be stored in low precision is cast
down and up again; inside one operator arithmetic is float32, as it accumulates on tensor cores.
"""

from __future__ import annotations

import onnx_ir as ir

from dexport.exporter.passes.precision import DATA_MOVEMENT, TORCH_TYPES


class EmulateLowPrecision(ir.passes.InPlacePass):
    """Needs ONNX Runtime or another executor that keeps a cast which loses precision."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        # A weight that no node could read any more in its own type is read through one cast.
        widened = {
            weight: self._cast_after(graph, weight, ir.DataType.FLOAT, before=next(iter(graph)))
            for weight in list(graph.initializers.values())
            if weight.dtype in TORCH_TYPES
        }
        for node in list(graph):
            self._compute_in_float32(graph, node, widened)
        return ir.passes.PassResult(model, modified=bool(widened))

    def _compute_in_float32(self, graph: ir.Graph, node: ir.Node, widened: dict[ir.Value, ir.Value]) -> None:
        if any(value in widened.values() for value in node.outputs):
            return
        for index, value in enumerate(node.inputs):
            if value in widened:
                node.replace_input_with(index, widened[value])
        for output in node.outputs:
            if output.dtype not in TORCH_TYPES:
                continue
            if node.op_type == "Cast":
                widened[output] = self._cast_after(graph, output, ir.DataType.FLOAT, after=node)
                continue
            low, output.dtype = output.dtype, ir.DataType.FLOAT
            if node.op_type not in DATA_MOVEMENT:
                readers = list(output.uses())
                rounded = self._cast_after(graph, output, low, after=node)
                producer = rounded.producer()
                assert producer is not None
                wide = self._cast_after(graph, rounded, ir.DataType.FLOAT, after=producer)
                for use in readers:
                    use.node.replace_input_with(use.idx, wide)

    def _cast_after(
        self,
        graph: ir.Graph,
        value: ir.Value,
        dtype: ir.DataType,
        *,
        after: ir.Node | None = None,
        before: ir.Node | None = None,
    ) -> ir.Value:
        node = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{value.name}/as_{dtype.name.lower()}")
        result = node.outputs[0]
        result.name, result.dtype, result.shape = node.name, dtype, value.shape
        if after is not None:
            graph.insert_after(after, node)
        elif before is not None:
            graph.insert_before(before, node)
        return result
