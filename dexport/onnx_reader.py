"""What an ONNX file would make its reader do: open other files, and inline functions. Read without onnx.

Only the fields on the way to a tensor's data are declared below; protobuf skips all others.
Source of the field numbers: ``onnx.proto3`` of onnx/onnx.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every command starts by way of here, and few read a graph
    from google.protobuf.message import Message

Name = tuple[bytes, bytes]
"""Domain and name of an operator or a function."""
EXTERNAL = 1
"""``TensorProto.DataLocation.EXTERNAL``."""
MOST_NODES = 1_000_000
"""After inlining; the largest networks here have some thousands."""
PACKAGE = "dexport_onnx"
FLOAT, INT8 = 1, 3
"""Of ``TensorProto.DataType``."""
ONE, MANY, BYTES, STRINGS, NUMBER = "one", "many", "bytes", "strings", "number"
FIELDS: dict[str, dict[str, tuple[int, str, str]]] = {
    "Model": {"graph": (7, ONE, "Graph"), "functions": (25, MANY, "Function"), "training": (20, MANY, "Training")},
    "Training": {"initialization": (1, ONE, "Graph"), "algorithm": (2, ONE, "Graph")},
    "Function": {
        "name": (1, BYTES, ""),
        "nodes": (7, MANY, "Node"),
        "domain": (10, BYTES, ""),
        "defaults": (11, MANY, "Attribute"),
    },
    "Graph": {
        "nodes": (1, MANY, "Node"),
        "initializers": (5, MANY, "Tensor"),
        "sparse_initializers": (15, MANY, "Sparse"),
    },
    "Node": {
        "inputs": (1, STRINGS, ""),
        "outputs": (2, STRINGS, ""),
        "operator": (4, BYTES, ""),
        "attributes": (5, MANY, "Attribute"),
        "domain": (7, BYTES, ""),
    },
    "Attribute": {
        "tensor": (5, ONE, "Tensor"),
        "graph": (6, ONE, "Graph"),
        "tensors": (10, MANY, "Tensor"),
        "graphs": (11, MANY, "Graph"),
        "sparse": (22, ONE, "Sparse"),
        "sparses": (23, MANY, "Sparse"),
    },
    "Sparse": {"values": (1, ONE, "Tensor"), "indices": (2, ONE, "Tensor")},
    "Tensor": {
        "type": (2, NUMBER, ""),
        "name": (8, BYTES, ""),
        "external": (13, MANY, "Entry"),
        "location": (14, NUMBER, ""),
    },
    "Entry": {"key": (1, BYTES, ""), "value": (2, BYTES, "")},
}
"""Message -> field -> (number, kind, type)."""


class NotOnnxError(ValueError):
    """These bytes are no ONNX file, or not a whole one."""


@dataclass(frozen=True)
class External:
    """Where the data of a tensor lies.

    Attributes:
        tensor: its name.
        location: a path relative to the ONNX file, as the file says.
        offset, length: in bytes; a length of None goes to the end.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


class OnnxFile:
    """An ONNX file, as far as it matters to whether it may be opened.

    Raises:
        NotOnnxError: it is no ONNX file, or nests too deep.
    """

    def __init__(self, content: bytes) -> None:
        from google.protobuf.message import DecodeError

        try:
            self._model = _model_class().FromString(content)
        except (DecodeError, RecursionError) as error:
            raise NotOnnxError(f"not a whole ONNX file: {error}") from error
        if not self._model.HasField("graph"):
            raise NotOnnxError("not an ONNX file: it has no graph")

    def external_data(self) -> list[External]:
        """All tensors that lie outside of the file, in subgraphs and functions too.

        Raises:
            ValueError: a place that is no UTF-8, or an offset that is no number.
        """
        tensors = (found for found in _all(self._model, "Tensor") if found.location == EXTERNAL or found.external)
        return [_external(tensor) for tensor in tensors]

    def int8_can_be_unsigned(self) -> bool:
        """Whether every int8 weight has a zero point, or is read by nothing but integer products.

        Those are, between QuantizeLinear and DequantizeLinear in float32: MatMul, and Conv with a quantised result.
        A value that two layers quantise, as in a gated MLP, may be left in float: ONNX Runtime shares its codes first.
        """
        types = {tensor.name: tensor.type for tensor in _all(self._model, "Tensor")}
        nodes = list(_all(self._model, "Node"))
        makers = {output: node for node in nodes for output in node.outputs}
        readers: dict[bytes, list[Any]] = {}
        for node in nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)

        def made_by(name: bytes, operator: bytes) -> Any:
            maker = makers.get(name)
            return maker if maker is not None and maker.operator == operator and maker.inputs else None

        def is_integer(node: Any) -> bool:
            restored = made_by(node.inputs[0], b"DequantizeLinear")
            rounded = made_by(restored.inputs[0], b"QuantizeLinear") if restored is not None else None
            if rounded is None or sum(reader.operator == rounded.operator for reader in readers[rounded.inputs[0]]) > 1:
                return False
            after = [reader.operator for output in node.outputs for reader in readers.get(output, ())]
            return node.operator == b"MatMul" or (node.operator == b"Conv" and after == [b"QuantizeLinear"])

        for node in nodes:
            if node.operator != b"DequantizeLinear" or not node.inputs or types.get(node.inputs[0]) != INT8:
                continue
            if len(node.inputs) > 2 and node.inputs[2]:
                continue
            found = [reader for output in node.outputs for reader in readers.get(output, ())]
            is_float = len(node.inputs) > 1 and types.get(node.inputs[1]) == FLOAT
            if not is_float or not all(is_integer(reader) for reader in found):
                return False
        return True

    def check_expansion(self) -> None:
        """Refuse functions that call each other in a circle, or that a runtime would inline to millions of nodes.

        Raises:
            ValueError: they do.
        """
        sizes = expanded_sizes(
            {(function.domain, function.name): _operators(function) for function in self._model.functions}
        )
        operators = _operators(self._model.graph)
        total = len(operators) + sum(sizes.get(operator, 0) for operator in operators)
        if total > MOST_NODES:
            raise ValueError(f"its functions stand for {total:,} nodes; at most {MOST_NODES:,} are read")


def expanded_sizes(bodies: Mapping[Name, Collection[Name]]) -> dict[Name, int]:
    """How many nodes each function stands for, with those that it calls inlined. Every body is read twice at most.

    Args:
        bodies: function -> the operators of its nodes.

    Raises:
        ValueError: functions call each other in a circle.
    """
    sizes: dict[Name, int] = {}
    pending = list(bodies)
    waiting: set[Name] = set()
    while pending:
        name = pending[-1]
        if name in sizes:
            pending.pop()
            continue
        calls = [operator for operator in bodies[name] if operator in bodies]
        missing = set(calls).difference(sizes)
        if missing:
            waiting.add(name)
            if waiting.intersection(missing):
                raise ValueError("its functions call each other in a circle")
            pending += missing
        else:
            sizes[name] = len(bodies[name]) + sum(sizes[operator] for operator in calls)
            waiting.discard(name)
    return sizes


def _operators(message: Any) -> list[Name]:
    return [(node.domain, node.operator) for node in _all(message, "Node")]


def _all(message: Any, kind: str) -> Iterator[Any]:
    """The messages of a kind below another. Iterative: only protobuf bounds how deep a file nests."""
    pending: list[Message] = [message]
    while pending:
        current = pending.pop()
        if current.DESCRIPTOR.name == kind:
            yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                pending.extend(value if field.is_repeated else [value])


def _external(tensor: Any) -> External:
    entries = {entry.key.decode(): entry.value.decode() for entry in tensor.external}
    length = entries.get("length")
    offset, size = int(entries.get("offset", "0")), None if length is None else int(length)
    if offset < 0 or (size is not None and size < 0):
        raise ValueError(f"a tensor lies at offset {offset} with {size} bytes")
    return External(tensor.name.decode(), entries.get("location", ""), offset, size)


@functools.cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in FIELDS.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind, of) in fields.items():
            field = declared.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if kind in (MANY, STRINGS) else kinds.LABEL_OPTIONAL
            if of:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{of}"
            else:
                field.type = kinds.TYPE_BYTES if kind in (BYTES, STRINGS) else kinds.TYPE_INT32
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.Model"))
