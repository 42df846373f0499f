"""Give an Attention node the packed projection as it is: (B, tokens, heads * size), without transposes to heads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from dexport.exporter.pytorch.module_path import module_path, set_module_path

HEADS_FIRST = (0, 2, 1, 3)
PACKED = 3
"""q, k and v in one projection."""


class AttentionOnTokens(ir.passes.InPlacePass):
    """Split the channels instead of the heads, which the operator separates and merges itself.

    ``Attention(Split(Transpose(Reshape(qkv (B,T,3D)))))`` and ``Reshape(Transpose(..))`` behind it ->
    ``Attention(Split(qkv))`` with the number of heads as attributes. Not where something else reads the heads, such as
    an output with the keys: they would be made in both ways, and the builder of TensorRT-RTX 1.7 dies of it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Attention" and node.domain == "":
                modified |= self._rewrite(model.graph, node)
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        packed, merged, heads = _packed(node), _merged(node), _heads(node)
        if packed is None or merged is None or heads is None or len(node.outputs) > 1:
            return False
        split = ir.node("Split", [packed], attributes={"axis": 2, "num_outputs": PACKED}, num_outputs=PACKED)
        attributes = {"q_num_heads": heads, "kv_num_heads": heads}
        attention = ir.node("Attention", split.outputs)
        attention.attributes.update(node.attributes)
        for name, value in attributes.items():
            attention.attributes[name] = ir.AttrInt64(name, value)
        for new, like in ((split, node.inputs[0]), (attention, node.outputs[0])):
            assert like is not None and like.dtype is not None
            set_module_path(new, module_path(node))
            for index, output in enumerate(new.outputs):
                output.name = f"{node.outputs[0].name}/{new.op_type}{index}"
                output.dtype, output.shape = like.dtype, merged.shape
        graph.insert_before(node, [split, attention])
        merged.replace_all_uses_with(attention.outputs[0])
        return True


def _packed(node: ir.Node) -> ir.Value | None:
    """qkv (B, T, 3D), where all inputs are thirds of its heads in order."""
    split = _maker(node.inputs[0], "Split")
    if split is None or list(node.inputs) != list(split.outputs) or split.attributes.get_int("axis", 0) != 1:
        return None
    if any(len(value.uses()) > 1 or value.is_graph_output() for value in split.outputs):
        return None
    thirds = [value.shape for value in split.outputs]
    transpose = _maker(split.inputs[0], "Transpose")
    if len(thirds) != PACKED or any(shape != thirds[0] for shape in thirds) or transpose is None:
        return None
    reshape = _maker(transpose.inputs[0], "Reshape")
    if reshape is None or tuple(transpose.attributes.get_ints("perm", ())) != HEADS_FIRST:
        return None
    source, result = reshape.inputs[0], reshape.outputs[0]
    return source if source is not None and _same_tokens(source, result) else None


def _merged(node: ir.Node) -> ir.Value | None:
    """The result (B, T, D), where nothing else reads it by heads."""
    transpose = _only_reader(node.outputs[0], "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != HEADS_FIRST:
        return None
    reshape = _only_reader(transpose.outputs[0], "Reshape")
    if reshape is None or reshape.outputs[0].is_graph_output():
        return None
    result = reshape.outputs[0]
    return result if _same_tokens(result, transpose.outputs[0]) else None


def _heads(node: ir.Node) -> int | None:
    first = node.inputs[0]
    heads = first.shape[1] if first is not None and first.shape is not None else None
    return heads if isinstance(heads, int) else None


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def _same_tokens(merged: ir.Value, by_heads: ir.Value) -> bool:
    """Whether (B, T, D) and (B, T, N, d) agree in B and T."""
    if merged.shape is None or by_heads.shape is None:
        return False
    return (len(merged.shape), len(by_heads.shape)) == (3, 4) and merged.shape[:2] == by_heads.shape[:2]
