"""Compute once what both halves of a doubled batch share, such as the embedding of the time in a fused guidance."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from dexport.exporter.pytorch.module_path import module_path, set_module_path

ELEMENTWISE = frozenset(
    {
        *("Add", "Cast", "Cos", "Div", "Erf", "Exp", "Gelu", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid"),
        *("Sin", "Sqrt", "Sub", "Tanh"),
    }
)
BY_SAMPLE = frozenset({"Conv", "Gemm", "LayerNormalization", "MatMul", "Reshape", "Transpose", "Unsqueeze"})
"""Operators that treat each sample of their first input by itself; the conditions are below."""


class ShareHalves(ir.passes.InPlacePass):
    """``Op(Concat(v, v), ..)`` -> ``Concat(Op(v, ..), Op(v, ..))`` along the batch, as far as it goes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        halves: dict[ir.Value | None, ir.Value] = {}
        modified = False
        for node in list(graph):
            half = _doubled(node)
            if half is not None:
                halves[node.outputs[0]] = half
            elif _treats_samples_alone(node, halves):
                joined = self._halve(graph, node, halves)
                halves[joined] = node.outputs[0]
                modified = True
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def _halve(self, graph: ir.Graph, node: ir.Node, halves: dict[ir.Value | None, ir.Value]) -> ir.Value:
        """Let a node compute one half; returns its output for both."""
        batch = next(halves[value] for value in node.inputs if value in halves).shape
        output = node.outputs[0]
        assert batch is not None and output.shape is not None and output.dtype is not None
        for index, value in enumerate(node.inputs):
            if value in halves:
                node.replace_input_with(index, halves[value])
        join = ir.node("Concat", [output, output], attributes={"axis": 0})
        set_module_path(join, module_path(node))
        joined = join.outputs[0]
        joined.name, joined.dtype, joined.shape = f"{output.name}/both", output.dtype, output.shape
        output.shape = ir.Shape([batch[0], *output.shape[1:]])
        output.replace_all_uses_with(joined)
        for index in (0, 1):
            join.replace_input_with(index, output)
        graph.insert_after(node, join)
        return joined


def _doubled(node: ir.Node) -> ir.Value | None:
    """v of ``Concat(v, v)`` along the batch."""
    if node.op_type != "Concat" or node.attributes.get_int("axis", -1) != 0 or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    known = first is not None and first.shape is not None and node.outputs[0].shape is not None
    return first if known and first is second else None


def _treats_samples_alone(node: ir.Node, halves: dict[ir.Value | None, ir.Value]) -> bool:
    doubled = [value for value in node.inputs if value in halves]
    others = [value for value in node.inputs if value is not None and value not in halves]
    output = node.outputs[0]
    if not doubled or node.domain or len(node.outputs) > 1 or output.is_graph_output() or output.shape is None:
        return False
    ranks = {len(value.shape) for value in (*doubled, output) if value is not None and value.shape is not None}
    batches = {value.shape[0] for value in (*doubled, output) if value is not None and value.shape}
    if len(batches) > 1:
        return False
    if node.op_type == "Concat":
        return not others and len(ranks) == 1 and node.attributes.get_int("axis", 0) % len(output.shape) != 0
    if node.op_type in ELEMENTWISE:
        return len(ranks) == 1 and all(_same_for_all(value, len(output.shape)) for value in others)
    if node.op_type not in BY_SAMPLE or node.inputs[0] not in halves or len(doubled) > 1:
        return False
    if not all(value.is_initializer() for value in others):
        return False
    match node.op_type:
        case "Gemm":
            bias = others[1] if len(others) > 1 else None
            return not node.attributes.get_int("transA", 0) and (bias is None or _same_for_all(bias, 2))
        case "LayerNormalization":
            return node.attributes.get_int("axis", -1) % len(output.shape) != 0
        case "MatMul":
            matrix = others[0].shape if others else None
            return len(ranks) == 1 and len(output.shape) > 1 and matrix is not None and len(matrix) == 2
        case "Transpose":
            return tuple(node.attributes.get_ints("perm", ()))[:1] == (0,)
    return True


def _same_for_all(value: ir.Value, rank: int) -> bool:
    """Whether a constant is broadcast along the batch."""
    shape = value.shape
    return value.is_initializer() and shape is not None and (len(shape) < rank or shape[0] == 1)
