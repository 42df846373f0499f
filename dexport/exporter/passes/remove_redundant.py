"""Remove nodes that change nothing: casts to the same type, reshapes and transposes that cancel, full slices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

WIDER = {
    (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
    (ir.DataType.FLOAT, ir.DataType.DOUBLE),
}
"""Casts that lose nothing, so that casting back is the identity. The other order rounds and has to stay."""


class RemoveRedundant(ir.passes.InPlacePass):
    """Repeat the rules below until none applies."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        progress = True
        while progress:
            progress = False
            for node in list(graph):
                rule = RULES.get(node.op_type)
                source = rule(node) if rule and node.domain == "" else None
                if source is None or node.outputs[0] in graph.outputs:
                    continue
                node.outputs[0].replace_all_uses_with(source)
                graph.remove(node, safe=True)
                progress = modified = True
        return ir.passes.PassResult(model, modified)


def _cast(node: ir.Node) -> ir.Value | None:
    """Cast(x: T -> T), and Cast(Cast(x: T -> wider) -> T)."""
    source = node.inputs[0]
    if source is None or source.dtype is None:
        return None
    if source.dtype == node.outputs[0].dtype:
        return source
    before = source.producer()
    if before is None or before.op_type != "Cast" or before.inputs[0] is None:
        return None
    original = before.inputs[0]
    lossless = (original.dtype, source.dtype) in WIDER
    return original if lossless and original.dtype == node.outputs[0].dtype else None


def _reshape(node: ir.Node) -> ir.Value | None:
    """Reshape to the shape that x has already, where at most one dimension is symbolic."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or source.shape != result.shape:
        return None
    return source if sum(not isinstance(dim, int) for dim in result.shape) <= 1 else None


def _transpose(node: ir.Node) -> ir.Value | None:
    """The identity permutation, and Transpose(Transpose(x)) whose permutations cancel."""
    source = node.inputs[0]
    permutation = node.attributes.get_ints("perm", None)
    if source is None or permutation is None:
        return None
    if list(permutation) == sorted(permutation):
        return source
    before = source.producer()
    if before is None or before.op_type != "Transpose":
        return None
    first = before.attributes.get_ints("perm", None)
    if first is None:
        return None
    cancels = [first[axis] for axis in permutation] == sorted(permutation)
    return before.inputs[0] if cancels else None


def _slice(node: ir.Node) -> ir.Value | None:
    """A slice from 0 to the end with step 1 on every axis it names."""
    constants = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs[1:]]
    if len(constants) < 2 or constants[0] is None or constants[1] is None:
        return None
    starts, ends = constants[0].numpy(), constants[1].numpy()
    steps = np.ones_like(starts) if len(constants) < 4 or constants[3] is None else constants[3].numpy()
    whole = (starts == 0).all() and (ends >= np.iinfo(np.int32).max).all() and (steps == 1).all()
    return node.inputs[0] if whole else None


RULES: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Cast": _cast,
    "Identity": lambda node: node.inputs[0],
    "Reshape": _reshape,
    "Slice": _slice,
    "Transpose": _transpose,
}
