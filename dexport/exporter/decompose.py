"""What torch's second trace would do to an exported program, without tracing.

``torch.onnx.export`` retraces a program to decompose composite operators and to make it functional. Of what our
networks consist of, five operators change by that, all for views of a tensor or casts: they are replaced here by what
the second trace makes of them. A program with anything else goes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import SymInt, fx
from torch.export import ExportedProgram

aten = torch.ops.aten
COMPOSITE = "CompositeImplicitAutograd"


def decompose(program: ExportedProgram) -> None:
    """Rewrite the program in place, and keep torch from tracing it again where nothing is left to decompose."""
    trace_again = program.run_decompositions
    _rewrite(program.graph)

    def run_decompositions(table: dict[Any, Any] | None = None) -> ExportedProgram:
        if table is None or not all(_stays(operator, table) for operator in _operators(program.graph)):
            return trace_again(table)
        return program

    program.run_decompositions = run_decompositions  # type: ignore[method-assign, assignment]


def _rewrite(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        rewrite = REWRITES.get(node.target)
        new = rewrite and rewrite(node)
        if not new:
            continue
        target, arguments = new
        if target is None:
            node.replace_all_uses_with(arguments[0])
            graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = target, arguments, {}


def _operators(graph: fx.Graph) -> Iterable[Any]:
    return (node.target for node in graph.nodes if node.op == "call_function")


def _stays(operator: Any, table: dict[Any, Any]) -> bool:
    """Whether the second trace leaves an operator as it is: nothing to decompose, and no aliasing to make explicit."""
    if not isinstance(operator, torch._ops.OpOverload):
        return callable(operator)
    schema = operator._schema
    aliases = any(result.alias_info is not None for result in schema.returns)
    composite = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return operator in MADE or (operator not in table and not schema.is_mutable and not (composite and aliases))


def _reshape(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    return (aten.reshape.default, (node.args[0], sizes)) if sizes.count(-1) < 2 else None


def _split(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    first, axis = node.meta["val"][0], node.args[2] if len(node.args) > 2 else 0
    size = first.shape[axis]
    return None if isinstance(size, SymInt) else (aten.split.Tensor, (node.args[0], size, axis))


def _cast(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    given, wanted = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return (None, node.args[:1]) if given == wanted else None


MADE = frozenset({aten.reshape.default, aten.split.Tensor})
REWRITES: dict[Any, Callable[[fx.Node], tuple[Any, tuple[Any, ...]] | None]] = {
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.chunk.default: _split,
    aten.to.dtype: _cast,
}
