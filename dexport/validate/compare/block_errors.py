"""Errors block by block: what a block adds itself, given exact inputs, and what has gathered by its end.

A block is a unit of the network: an element of a list of modules, or a module beside such lists. Its boundary is every
floating-point value that other blocks read. Three graphs compute these values:

- the reference, run freely: the exact values;
- the graph under test, run freely: the *propagated* error;
- the graph under test with every boundary value replaced by the reference's: each block's *own* error.

What rounding explains of an own error is that of the reference graph converted to the same precision. The rest is
*unexplained*: the distance between the two on the same inputs, zero where the graph is what an export writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from dexport.errors import InputError
from dexport.exporter.pytorch.module_path import module_path
from dexport.validate.compare.graph_diff import Difference
from dexport.validate.compare.subgraph import CutGraph, Part
from dexport.validate.metrics import plain

CHUNK_BYTES = 400_000_000
"""Weights that are in memory at one time, as the reference stores them: a few blocks of the largest network."""
NOISE = 1e-6
"""Unexplained relative L2 error up to which two graphs count as the same: float32 sums in another order."""
SHARE_OF_ROUNDING = 0.1
"""The same as a share of what rounding explains: another order of summation turns a few of the roundings."""
TINY = 1e-6
"""Root mean square below which a reference value counts as zero."""

OnProgress = Callable[[int, int, str], None]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Deviation:
    """Relative L2 errors of one value.

    Attributes:
        own: computed from the reference's values.
        propagated: in the free run; None where that was not run.
        expected: own error that the precision explains; None where that is not known.
        unexplained: distance from what an export in this precision computes of the same inputs; None where that is not
            known.
        finite: whether every value is.
        allowed: largest own error of a block.
    """

    own: float
    propagated: float | None
    expected: float | None
    unexplained: float | None
    finite: bool
    allowed: float

    @property
    def comparable(self) -> bool:
        """Whether what an export computes here is known, so that ``altered`` means something."""
        return self.unexplained is not None

    @property
    def altered(self) -> bool:
        """Whether something else is computed than an export computes, rounding aside."""
        if self.unexplained is None or self.expected is None:
            return False
        rounding = self.expected if np.isfinite(self.expected) else 0.0
        return self.unexplained > max(NOISE, SHARE_OF_ROUNDING * rounding)

    @property
    def imprecise(self) -> bool:
        """Whether the own error is too large, whatever explains it."""
        return not (self.finite and self.own <= self.allowed)

    @property
    def passed(self) -> bool:
        return not (self.altered or self.imprecise)


@dataclass(frozen=True)
class BlockError(Deviation):
    """The errors of a block, at the boundary value where each is largest.

    Attributes:
        path: module path; empty for what the network computes outside of its blocks.
        value: the boundary value with the largest own error.
        differences: weights and attributes in it that are not those of an export; whatever they do, they are wrong.
    """

    path: str
    value: str
    differences: tuple[Difference, ...]

    @property
    def altered(self) -> bool:
        return bool(self.differences) or super().altered

    def to_json(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite becomes null."""
        return {**plain(asdict(self)), "passed": self.passed}


@dataclass(frozen=True)
class Chunk:
    """A stretch of the execution order: its nodes, and the boundary values that they compute, by name."""

    nodes: frozenset[str]
    boundary: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a graph is cut.

    Attributes:
        paths: of the blocks; what lies outside of them belongs to the block of its own path.
        blocks: node name -> path of its block.
        boundary: boundary value -> path of its block, in execution order.
        shared: node name -> its outputs that can be compared: float32 here, floating point of the same shape there.
        chunks: a few blocks each.
    """

    paths: frozenset[str]
    blocks: Mapping[str, str]
    boundary: Mapping[str, str]
    shared: Mapping[str, tuple[str, ...]]
    chunks: tuple[Chunk, ...]

    def block_of(self, module: str) -> str:
        """The block that a module belongs to."""
        parts = module.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((path for path in above if path in self.paths), module)


def block_paths(network: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks of a network, in the order of its modules.

    Elements of a ``ModuleList`` are blocks, and so are the modules beside one; a module that holds such a list is none.
    """

    def below(path: str, module: nn.Module) -> Iterator[str]:
        if path and not any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
            yield path
            return
        for name, child in module.named_children():
            yield from below(f"{path}.{name}" if path else name, child)

    return tuple(below("", network))


def lay_out(reference: CutGraph, actual: CutGraph, paths: Sequence[str]) -> Layout:
    """Cut two graphs of one network at the values that they share between blocks.

    Args:
        paths: of the blocks.

    Raises:
        InputError: they share no value, not even an output.
    """
    nodes = list(reference.model.graph)
    layout = Layout(frozenset(paths), {}, {}, {}, ())
    blocks = {str(node.name): layout.block_of(module_path(node)) for node in nodes}
    shared, boundary = {}, {}
    outputs = set(reference.model.graph.outputs)
    for node in nodes:
        block = blocks[str(node.name)]
        values = [value for value in node.outputs if _is_shared(value, actual)]
        shared[str(node.name)] = tuple(str(value.name) for value in values)
        for value in values:
            if value in outputs or any(blocks[str(use.node.name)] != block for use in value.uses()):
                boundary[str(value.name)] = block
    if not boundary:
        raise InputError(
            f"{actual.folder} shares no value of equal name and shape with the graph that it is compared with",
            hint="is its model.onnx an export of the same network? `dexport build` it again",
        )
    return replace(layout, blocks=blocks, boundary=boundary, shared=shared, chunks=_chunks(nodes, blocks, boundary))


def _is_shared(value: ir.Value, actual: CutGraph) -> bool:
    other = actual.values.get(str(value.name))
    if other is None or other.dtype is None or value.dtype != ir.DataType.FLOAT or value.shape is None:
        return False
    return other.dtype.is_floating_point() and value.shape == other.shape


def _chunks(nodes: Sequence[ir.Node], blocks: Mapping[str, str], boundary: Mapping[str, str]) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    current: list[ir.Node] = []
    read: set[ir.Value] = set()

    def close() -> None:
        names = (str(value.name) for node in current for value in node.outputs)
        computed = tuple(name for name in names if name in boundary)
        if computed:
            chunks.append(Chunk(frozenset(str(node.name) for node in current), computed))
            current.clear()
            read.clear()

    for node in nodes:
        leaves_block = current and blocks[str(current[-1].name)] != blocks[str(node.name)]
        if leaves_block and _bytes(read) > CHUNK_BYTES:
            close()
        current.append(node)
        read |= {value for value in node.inputs if value is not None and value.is_initializer()}
    close()
    return tuple(chunks)


def _bytes(weights: Collection[ir.Value]) -> int:
    return sum(weight.const_value.nbytes for weight in weights if weight.const_value is not None)


@dataclass(frozen=True)
class Swept:
    """One chunk of a sweep.

    Attributes:
        values: the reference's boundary values, of this chunk and those before it that are still read.
        errors: of the boundary values of this chunk.
    """

    chunk: Chunk
    values: Arrays
    errors: Mapping[str, Deviation]


def sweep(
    layout: Layout,
    reference: CutGraph,
    actual: CutGraph,
    expected: CutGraph | None,
    inputs: Arrays,
    allowed: float,
    on_progress: OnProgress,
) -> Iterator[Swept]:
    """Errors of every boundary value, a chunk of blocks at a time.

    Args:
        expected: the reference in the precision of ``actual``; ``actual`` itself where nothing differs; None where it
            cannot be had.
        inputs: example inputs, by name.
        allowed: largest own error, relative L2.
    """
    plan = _plan(layout, reference, actual, None if expected is actual else expected)
    values, propagated = dict(inputs), dict(inputs)
    for number, parts in enumerate(plan):
        boundary = parts.chunk.boundary
        on_progress(number, len(plan), layout.boundary[boundary[0]] or "outside of blocks")
        values |= parts.exact.run(values)
        free_run, own = parts.free.run(propagated), parts.own.run(values)
        propagated |= free_run
        explained: Arrays = own if expected is actual else parts.explained.run(values) if parts.explained else {}
        errors = {
            name: deviation(values[name], own[name], explained.get(name), allowed, free_run[name]) for name in boundary
        }
        yield Swept(parts.chunk, values, errors)
        later = plan[number + 1 :]
        _forget(values, inputs, [part for parts in later for part in (parts.exact, parts.own, parts.explained)])
        _forget(propagated, inputs, [parts.free for parts in later])
    on_progress(len(plan), len(plan), "")


@dataclass(frozen=True)
class _Parts:
    """What computes the boundary values of a chunk: ``exact`` and ``free`` from those of the chunks before, ``own`` and
    ``explained`` from all others."""

    chunk: Chunk
    exact: Part
    free: Part
    own: Part
    explained: Part | None


def _plan(layout: Layout, reference: CutGraph, actual: CutGraph, expected: CutGraph | None) -> list[_Parts]:
    plan = []
    before: set[str] = set()
    for chunk in layout.chunks:
        plan.append(
            _Parts(
                chunk,
                exact=reference.part(chunk.boundary, before),
                free=actual.part(chunk.boundary, before),
                own=actual.part(chunk.boundary, layout.boundary.keys()),
                explained=None if expected is None else expected.part(chunk.boundary, layout.boundary.keys()),
            )
        )
        before |= set(chunk.boundary)
    return plan


def _forget(values: dict[str, np.ndarray], inputs: Arrays, later: Sequence[Part | None]) -> None:
    """Drop what no later part reads."""
    needed = {name for part in later if part is not None for name in part.needs}
    for name in values.keys() - needed - inputs.keys():
        del values[name]


def deviation(
    reference: np.ndarray,
    own: np.ndarray,
    explained: np.ndarray | None,
    allowed: float,
    free_run: np.ndarray | None = None,
) -> Deviation:
    """Errors of one value; see :class:`Deviation`."""
    return Deviation(
        own=relative_l2(reference, own),
        propagated=None if free_run is None else relative_l2(reference, free_run),
        expected=None if explained is None else relative_l2(reference, explained),
        unexplained=None if explained is None else relative_l2(explained, own),
        finite=bool(np.isfinite(own).all()),
        allowed=allowed,
    )


def relative_l2(reference: np.ndarray, actual: np.ndarray) -> float:
    """||actual - reference|| / ||reference|| in float64; infinite unless what is not finite is the same in both."""
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], actual[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return float("inf")
    exact, got = reference[finite].astype(np.float64), actual[finite].astype(np.float64)
    zero = TINY * np.sqrt(max(exact.size, 1))
    return float(np.linalg.norm(got - exact) / max(np.linalg.norm(exact), zero))


def by_block(
    layout: Layout, errors: Mapping[str, Deviation], differences: Sequence[Difference] = ()
) -> tuple[BlockError, ...]:
    """The worst errors of every block, in execution order.

    Args:
        differences: that are decisive; those in no block count as the last one's.
    """
    blocks: dict[str, list[str]] = {}
    for name, block in layout.boundary.items():
        blocks.setdefault(block, []).append(name)
    last = next(reversed(blocks))
    inside: dict[str, list[Difference]] = {}
    for difference in differences:
        block = layout.block_of(difference.module)
        inside.setdefault(block if block in blocks else last, []).append(difference)
    return tuple(
        _worst(path, {name: errors[name] for name in names}, tuple(inside.get(path, ())))
        for path, names in blocks.items()
    )


def _worst(path: str, errors: Mapping[str, Deviation], differences: tuple[Difference, ...]) -> BlockError:
    """Each figure at its largest; the own error decides which value is named, unless another one is altered."""
    name, worst = max(errors.items(), key=lambda item: (item[1].altered, not item[1].finite, item[1].own))
    propagated = [error.propagated for error in errors.values() if error.propagated is not None]
    return BlockError(
        own=worst.own,
        propagated=max(propagated, default=None),
        expected=worst.expected,
        unexplained=worst.unexplained,
        finite=all(error.finite for error in errors.values()),
        allowed=worst.allowed,
        path=path,
        value=name,
        differences=differences,
    )
