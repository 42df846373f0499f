"""Replace what depends on time alone by tables with one row for each time that a sampler will ask for.

Time embeddings, and scales and shifts that are functions of them, have few different values in a sampling run whose
steps are fixed. They are computed when the table is written, in float32, and the graph looks them up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import serde
from onnx_ir.passes import common

from dexport.errors import InputError
from dexport.exporter.passes.lazy import add_initializer
from dexport.exporter.passes.precision import SHAPE_QUERIES
from dexport.exporter.pytorch.module_path import TIME_TABLE, inside, module_path, set_module_path
from dexport.runtime.session import OnnxSession

TABLE = "/table"
TIMES = f"{TIME_TABLE}/times"
TOLERANCE = 1e-5
"""Largest relative L2 between a row that was computed among others and the same one elsewhere in the batch."""


class FoldTime(ir.passes.InPlacePass):
    """Tables for the values where what depends on time alone meets the rest of the graph.

    The row is the one of the nearest time, per sample; the graph keeps its inputs. Only values whose first axis is the
    batch, and whose others are fixed, can be rows of a table: where there are others, what they need is kept. Weights
    are read when the tables are.

    Args:
        name: the graph's time input, of shape (B,).
        times: (S,) float32, without repetitions.
        keep: glob patterns of modules that are left alone.
    """

    def __init__(self, name: str, times: np.ndarray, keep: Collection[str] = ()) -> None:
        self.name = name
        self.times = times
        self.keep = tuple(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        time = next(value for value in graph.inputs if value.name == self.name)
        found = _Dependent(graph, time, self.keep)
        frontier = found.frontier()
        if not frontier:
            return ir.passes.PassResult(model, modified=False)
        tables = {value: self._table(model, found, value) for value in frontier}  # before any name changes
        nearest = _nearest(graph, time, self.times)
        indices = {1: nearest}
        for value, table in tables.items():
            copies = found.copies[value]
            if copies not in indices:
                indices[copies] = _repeated(graph, nearest, copies)
            _look_up(graph, value, table, indices[copies])
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _table(self, model: ir.Model, found: _Dependent, value: ir.Value) -> ir.LazyTensor:
        computation = _Computation.of(model, found, value)
        shape, name = (len(self.times), *_row(value)), f"{value.name}{TABLE}"
        assert value.dtype is not None

        def compute() -> ir.TensorProtocol:
            return ir.Tensor(computation.run(self.times), name=name)

        return ir.LazyTensor(compute, dtype=value.dtype, shape=ir.Shape(shape), name=name)


class _Dependent:
    """Which values are functions of the time alone, row by row.

    Attributes:
        time: the input.
        copies: such a value -> of how many batches behind each other: guidance that is part of the graph doubles them.
        repeats: those that only repeat the time.
        fixed: values that are functions of stored ones only.
    """

    def __init__(self, graph: ir.Graph, time: ir.Value, keep: Sequence[str]) -> None:
        self.graph = graph
        self.time = time
        self.copies: dict[ir.Value, int] = {time: 1}
        self.repeats = {time}
        self.fixed: set[ir.Value] = set(graph.initializers.values())
        for node in graph:
            if not _is_plain(node):
                continue
            given = [value for value in node.inputs if value is not None]
            if not all(value in self.copies or value in self.fixed for value in given):
                continue
            dependent = {value: self.copies[value] for value in given if value in self.copies}
            if not dependent:
                self.fixed.update(node.outputs)
            elif _is_repetition(node):
                self.copies[node.outputs[0]] = len(given) * dependent[given[0]]
                if given[0] in self.repeats:
                    self.repeats.add(node.outputs[0])
            elif len(set(dependent.values())) == 1 and not any(inside(module_path(node), pattern) for pattern in keep):
                first, copies = next(iter(dependent.items()))
                if all(_is_row_wise(output, first) for output in node.outputs):
                    self.copies |= dict.fromkeys(node.outputs, copies)

    def frontier(self) -> list[ir.Value]:
        """Computed values that the rest of the graph reads, in execution order."""
        return [
            value
            for value in self.copies
            if value not in self.repeats
            and (value in self.graph.outputs or any(use.node.outputs[0] not in self.copies for use in value.uses()))
        ]

    def nodes_of(self, value: ir.Value) -> list[ir.Node]:
        """What computes a value from the time, in execution order."""
        needed: set[ir.Node] = set()
        waiting = [value]
        while waiting:
            node = waiting.pop().producer()
            if node is None or node in needed:
                continue
            needed.add(node)
            waiting += [given for given in node.inputs if given is not None]
        return [node for node in self.graph if node in needed]


def _is_plain(node: ir.Node) -> bool:
    """A node of the standard that reads values, not shapes: those have no row per sample."""
    bodies = any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node))
    return node.domain == "" and node.op_type not in SHAPE_QUERIES and not bodies


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return [attribute for attribute in node.attributes.values() if isinstance(attribute, ir.Attr)]


def _is_repetition(node: ir.Node) -> bool:
    """Whether it puts a value behind itself."""
    return node.op_type == "Concat" and node.attributes.get_int("axis", -1) == 0 and len(set(node.inputs)) == 1


def _is_row_wise(value: ir.Value, given: ir.Value) -> bool:
    """Whether the first axis is that of what is given, and the others are fixed. A run shows that rows do not mix."""
    if value.shape is None or given.shape is None or not len(value.shape) or value.dtype is None:
        return False
    return value.shape[0] == given.shape[0] and all(isinstance(size, int) for size in value.shape[1:])


def _row(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(size for size in value.shape[1:] if isinstance(size, int))


@dataclass(frozen=True)
class _Computation:
    """A part of a graph that can be run when its graph has changed, for one batch; weights are read then."""

    time: str
    output: str
    nodes: tuple[onnx.NodeProto, ...]
    weights: Mapping[str, ir.TensorProtocol]
    opset: int
    ir_version: int

    @classmethod
    def of(cls, model: ir.Model, found: _Dependent, value: ir.Value) -> _Computation:
        nodes = found.nodes_of(value)
        read = (given for node in nodes for given in node.inputs if given is not None)
        weights = {
            str(given.name): given.const_value
            for given in read
            if given.is_initializer() and given.const_value is not None
        }
        protos = tuple(map(_of_one_batch, nodes))
        opset = model.graph.opset_imports[""]
        return cls(str(found.time.name), str(value.name), protos, weights, opset, model.ir_version)

    def run(self, times: np.ndarray) -> np.ndarray:
        """One row per time.

        Raises:
            InputError: rows that depend on each other.
        """
        graph = onnx.helper.make_graph(
            list(self.nodes),
            "time",
            [onnx.helper.make_tensor_value_info(self.time, onnx.TensorProto.FLOAT, ["S"])],
            [onnx.ValueInfoProto(name=self.output)],
            [serde.serialize_tensor(ir.Tensor(weight.numpy(), name=name)) for name, weight in self.weights.items()],
        )
        imports = [onnx.helper.make_opsetid("", self.opset)]
        built = onnx.helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)
        session = OnnxSession(built.SerializeToString())
        both = session(**{self.time: np.concatenate([times, times[::-1]])})[self.output]
        rows, again = both[: len(times)], both[: len(times) - 1 : -1]
        if np.linalg.norm(rows - again) > TOLERANCE * np.linalg.norm(rows):
            raise InputError(
                f"{self.output} mixes the times of a batch, so it cannot be computed for each time",
                hint="leave out --fold-steps",
            )
        return rows


def _of_one_batch(node: ir.Node) -> onnx.NodeProto:
    """A repetition has the rows of what it repeats."""
    proto = serde.serialize_node(node)
    if not _is_repetition(node):
        return proto
    return onnx.helper.make_node("Identity", proto.input[:1], proto.output)


def _nearest(graph: ir.Graph, time: ir.Value, times: np.ndarray) -> ir.Value:
    """The row of the time that is nearest to that of each sample; (B,) int64."""
    batch = time.shape[0] if time.shape is not None else None
    stored = add_initializer(graph, ir.Tensor(times, name=TIMES))
    axis = add_initializer(graph, ir.Tensor(np.array([1]), name=f"{TIME_TABLE}/axis"))
    nodes: list[ir.Node] = []

    def add(op: str, inputs: Sequence[ir.Value], shape: Sequence[object], **attributes: int) -> ir.Value:
        dtype = ir.DataType.INT64 if op == "ArgMin" else ir.DataType.FLOAT
        nodes.append(_node(op, inputs, shape, dtype, name=op, **attributes))
        return nodes[-1].outputs[0]

    column = add("Unsqueeze", [time, axis], [batch, 1])
    distance = add("Abs", [add("Sub", [column, stored], [batch, len(times)])], [batch, len(times)])
    index = add("ArgMin", [distance], [batch], axis=1, keepdims=0)
    graph.insert_before(graph[0], nodes)
    return index


def _repeated(graph: ir.Graph, index: ir.Value, copies: int) -> ir.Value:
    producer, batch = index.producer(), index.shape[0] if index.shape is not None else None
    assert producer is not None
    rows = copies * batch if isinstance(batch, int) else None
    node = _node("Concat", [index] * copies, [rows], ir.DataType.INT64, name=f"Concat_{copies}", axis=0)
    graph.insert_after(producer, node)
    return node.outputs[0]


def _node(
    op: str, inputs: Sequence[ir.Value], shape: Sequence[object], dtype: ir.DataType, *, name: str, **attributes: int
) -> ir.Node:
    node = ir.node(op, inputs, attributes=attributes, name=f"{TIME_TABLE}/{name}")
    value = node.outputs[0]
    value.name, value.shape, value.dtype = node.name, ir.Shape(shape), dtype  # type: ignore[arg-type]
    set_module_path(node, TIME_TABLE)
    return node


def _look_up(graph: ir.Graph, value: ir.Value, table: ir.LazyTensor, index: ir.Value) -> None:
    """A row of ``table`` takes the place and the name of ``value``."""
    producer = value.producer()
    assert producer is not None
    node = ir.node("Gather", [add_initializer(graph, table), index], attributes={"axis": 0})
    row = node.outputs[0]
    row.shape, row.type = value.shape, value.type
    row.name, value.name = value.name, f"{value.name}/computed"
    node.name = f"{row.name}/Gather"
    set_module_path(node, module_path(producer))
    graph.insert_after(producer, node)
    ir.convenience.replace_all_uses_with(value, row, replace_graph_outputs=True)
