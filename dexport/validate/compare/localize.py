"""The search behind ``dexport diff``: all blocks in one sweep, the operations of the bad ones, islands that help."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from dexport.exporter.pytorch.module_path import inside, module_path
from dexport.exporter.recipes.recipe import Islands
from dexport.validate.compare.block_errors import (
    Arrays,
    BlockError,
    Deviation,
    OnProgress,
    Swept,
    by_block,
    deviation,
    relative_l2,
    sweep,
)
from dexport.validate.compare.graph_pair import Comparison
from dexport.validate.compare.subgraph import CutGraph

ROUNDS = 4
"""How often islands are widened before the search gives up."""


@dataclass(frozen=True)
class OpError(Deviation):
    """The errors of one value inside a block, computed from the reference's values in front of its operation.

    Attributes:
        node, op_type, module: the operation.
        value: name of the value.
        dtype: type that the file stores it in.
        largest: largest finite magnitude in the reference, ``largest_actual`` in the bundle.
        not_finite: how many of the bundle's ``size`` values are not finite.
    """

    node: str
    op_type: str
    module: str
    value: str
    dtype: str
    largest: float
    largest_actual: float
    not_finite: int
    size: int


@dataclass(frozen=True)
class Outcome:
    """What a sweep found.

    Attributes:
        blocks: in execution order.
        operations: bad block -> its bad operations, in execution order.
        outputs: error of the outputs, in the free run; where these are integers, of what they are chosen by.
        pytorch: block -> error of the reference's graph against PyTorch, where they could be matched.
        exact: whether the reference's outputs are those of PyTorch; True where that was not compared.
    """

    blocks: tuple[BlockError, ...]
    operations: Mapping[str, tuple[OpError, ...]]
    outputs: float
    pytorch: Mapping[str, float]
    exact: bool


@dataclass(frozen=True)
class Mend:
    """Islands that would mend a precision fault, tried out.

    Attributes:
        islands: module patterns, as for ``--island``.
        before, after: own errors of the blocks that were bad, by path.
        output_before, output_after: errors of the outputs, in the free run.
        enough: whether nothing is bad any more.
    """

    islands: tuple[str, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    output_before: float
    output_after: float
    enough: bool


@dataclass(frozen=True)
class Search:
    """Everything that stays the same from sweep to sweep.

    Attributes:
        allowed: largest own error of a block, relative L2; ``allowed_export`` that of the reference against PyTorch.
        taps, outputs: what PyTorch's modules and the whole of it return; empty where it is not compared.
    """

    comparison: Comparison
    inputs: Arrays
    allowed: float
    allowed_export: float
    taps: Arrays
    outputs: Arrays
    on_progress: OnProgress

    def run(self, actual: CutGraph, expected: CutGraph | None) -> Outcome:
        """Sweep over all blocks; look into the bad ones, of which those that differ by more than rounding only once."""
        layout, reference = self.comparison.layout, self.comparison.reference
        suspects = {layout.block_of(d.module) for d in self.comparison.decisive}
        names = {str(value.name) for value in reference.model.graph.outputs}
        errors: dict[str, Deviation] = {}
        operations: dict[str, tuple[OpError, ...]] = {}
        pytorch: dict[str, float] = {}
        exact, altered_seen = True, False
        for swept in sweep(layout, reference, actual, expected, self.inputs, self.allowed, self.on_progress):
            errors |= swept.errors
            for name in swept.errors.keys() & self.outputs.keys():
                exact &= relative_l2(self.outputs[name], swept.values[name]) <= self.allowed_export
            for block in dict.fromkeys(layout.boundary[name] for name in swept.chunk.boundary):
                own = {name: error for name, error in swept.errors.items() if layout.boundary[name] == block}
                if (match := _match(self.taps.get(block), [swept.values[name] for name in own])) is not None:
                    pytorch[block] = match
                altered = block in suspects or any(error.altered for error in own.values())
                if any(error.imprecise for error in own.values()) or (altered and not altered_seen):
                    operations[block] = self._operations(swept, block, actual, expected)
                    altered_seen |= altered
        return Outcome(
            blocks=by_block(layout, errors, self.comparison.decisive),
            operations=operations,
            outputs=max(_propagated(errors, names)),
            pytorch=pytorch,
            exact=exact,
        )

    def _operations(self, swept: Swept, block: str, actual: CutGraph, expected: CutGraph | None) -> tuple[OpError, ...]:
        """The bad operations of a block: each is given what the reference computes in front of it."""
        layout, reference = self.comparison.layout, self.comparison.reference
        nodes = [node for node in layout.shared if node in swept.chunk.nodes and layout.blocks[node] == block]
        names = [name for node in nodes for name in layout.shared[node]]
        exact = reference.part(names, layout.boundary.keys()).run(swept.values)
        values, cuts = {**swept.values, **exact}, {*layout.boundary, *names}
        own = actual.part(names, cuts).run(values)
        explained: Arrays = {}
        if expected is not None:
            explained = own if expected is actual else expected.part(names, cuts).run(values)
        found = [_operation(actual, name, exact[name], own[name], explained.get(name), self.allowed) for name in names]
        differing = {difference.node for difference in self.comparison.decisive}
        altered = [error for error in found if error.altered or error.node in differing]
        imprecise = [error for error in found if error.imprecise]
        return tuple(altered or imprecise or sorted(found, key=lambda error: -error.own)[:1])

    def mend(self, islands: Islands, before: Outcome) -> Mend:
        """Add islands around what is imprecise, wider ones where that is not enough."""
        convert = self.comparison.convert
        assert convert is not None, "only a conversion of the reference has islands"
        added: list[str] = []
        outcome = before
        for _ in range(ROUNDS):
            wanted = [
                pattern
                for block in outcome.blocks
                if block.imprecise
                for pattern in _islands_for(block.path, outcome.operations[block.path], (*islands.modules, *added))
            ]
            if not wanted:
                break
            added = _without_covered([*added, *dict.fromkeys(wanted)])
            converted = convert(replace(islands, modules=(*islands.modules, *added)))
            outcome = replace(self, taps={}, outputs={}).run(converted, converted)
        bad = {block.path for block in before.blocks if block.imprecise}
        return Mend(
            islands=tuple(added),
            before={block.path: block.own for block in before.blocks if block.path in bad},
            after={block.path: block.own for block in outcome.blocks if block.path in bad},
            output_before=before.outputs,
            output_after=outcome.outputs,
            enough=not any(block.imprecise for block in outcome.blocks),
        )


def _propagated(errors: Mapping[str, Deviation], names: Container[str]) -> list[float]:
    """Errors of the outputs in the free run; of the last value that has one where no output is of numbers."""
    found = [error.propagated or 0.0 for name, error in errors.items() if name in names]
    return found or [error.propagated or 0.0 for error in errors.values()][-1:]


def _match(tap: np.ndarray | None, values: Iterable[np.ndarray]) -> float | None:
    """Error of the value that a module's output has become; None where no boundary value has its shape."""
    if tap is None:
        return None
    return min((relative_l2(tap, value) for value in values if value.shape == tap.shape), default=None)


def _operation(
    actual: CutGraph, name: str, exact: np.ndarray, own: np.ndarray, explained: np.ndarray | None, allowed: float
) -> OpError:
    value = actual.values[name]
    node = _producer(value)
    while node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].producer() is not None:
        value = node.inputs[0]  # a border of an island, or of the graph: computed before it
        node = _producer(value)
    assert value.dtype is not None
    finite = np.isfinite(own)
    return OpError(
        **vars(deviation(exact, own, explained, allowed)),
        node=str(node.name),
        op_type=node.op_type,
        module=module_path(node),
        value=name,
        dtype=value.dtype.name.lower(),
        largest=float(np.abs(exact).max(initial=0.0, where=np.isfinite(exact))),
        largest_actual=float(np.abs(own).max(initial=0.0, where=finite)),
        not_finite=int(own.size - finite.sum()),
        size=own.size,
    )


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, f"{value.name} is computed"
    return node


def _islands_for(block: str, operations: Sequence[OpError], islands: Sequence[str]) -> list[str]:
    """Modules of the bad operations; the whole block where they are islands already."""

    def covered(path: str) -> bool:
        return any(inside(path, pattern) for pattern in islands)

    modules = dict.fromkeys(operation.module for operation in operations if not covered(operation.module))
    return list(modules) or ([] if covered(block) else [block])


def _without_covered(patterns: Sequence[str]) -> list[str]:
    return [
        pattern for pattern in patterns if not any(other != pattern and inside(pattern, other) for other in patterns)
    ]
