"""What torch's second trace would do to an exported program, without tracing.

``torch.onnx.export`` traces a program again to decompose composite operators and to make it functional. Six operators
of our networks change by that, views of a tensor, casts and the square: they are replaced here by what ONNX is given
for the result of the second trace. A program with anything else to decompose goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten


def decompose(program: ExportedProgram) -> None:
    """Rewrite the program in place, and keep torch from tracing it again where nothing is left to decompose."""
    trace_again = program.run_decompositions
    for node in list(program.graph.nodes):
        if node.target in REWRITES:
            REWRITES[node.target](node)

    def run_decompositions(decomp_table: dict[Any, Any], **options: Any) -> ExportedProgram:
        operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
        if all(_stays(operator, decomp_table) for operator in operators):
            return program
        return trace_again(decomp_table, **options)

    program.run_decompositions = run_decompositions


def _stays(operator: Any, table: dict[Any, Any]) -> bool:
    """Whether the second trace leaves an operator as it is: it has no decomposition, and hides no view or write.

    Composite operators that may hide one, such as the batch norm, say so by a tag.
    """
    if operator is aten.reshape.default or not isinstance(operator, torch._ops.OperatorBase):
        return True
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    schema = operator._schema
    composite = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    is_view = any(result.alias_info is not None for result in schema.returns)
    may_hide = is_view or torch.Tag.maybe_aliasing_or_mutating in operator.tags
    return operator not in table and not schema.is_mutable and not (composite and may_hide)


def _reshape(node: fx.Node) -> None:
    """To a target with -1 for the symbolic size; several of those have to be computed. A view where there is none."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) < 2:
        _replace(node, aten.reshape.default if -1 in sizes else aten.view.default, node.args[0], sizes)


def _split(node: fx.Node) -> None:
    tensor, _, axis = (*node.args, 0)[:3]
    size = node.meta["val"][0].shape[axis]
    if isinstance(size, int):
        _replace(node, aten.split.Tensor, tensor, size, axis)


def _cast(node: fx.Node) -> None:
    tensor: Any = node.args[0]
    if tensor.meta["val"].dtype == node.meta["val"].dtype:
        node.replace_all_uses_with(tensor)
        node.graph.erase_node(node)
    else:
        _replace(node, aten._to_copy.default, tensor, dtype=node.meta["val"].dtype)


def _square(node: fx.Node) -> None:
    _replace(node, aten.pow.Tensor_Scalar, node.args[0], 2)


def _replace(node: fx.Node, operator: Any, *arguments: Any, **named: Any) -> None:
    node.target, node.args, node.kwargs = operator, arguments, named


REWRITES: dict[Any, Callable[[fx.Node], None]] = {
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.chunk.default: _split,
    aten.to.dtype: _cast,
    aten.square.default: _square,
}
