"""Where the tensors of an ONNX file lie outside of it: read without onnx, so that production code can check too.

Only the fields on the way to a tensor's data are declared below; protobuf skips all others.
Source of the field numbers: ``onnx.proto3`` of onnx/onnx.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

EXTERNAL = 1
"""``TensorProto.DataLocation.EXTERNAL``."""
PACKAGE = "dexport_onnx"
ONE, MANY, BYTES, NUMBER = "one", "many", "bytes", "number"
FIELDS: dict[str, dict[str, tuple[int, str, str]]] = {
    "Model": {"graph": (7, ONE, "Graph"), "functions": (25, MANY, "Function"), "training": (20, MANY, "Training")},
    "Training": {"initialization": (1, ONE, "Graph"), "algorithm": (2, ONE, "Graph")},
    "Function": {"nodes": (7, MANY, "Node"), "defaults": (11, MANY, "Attribute")},
    "Graph": {
        "nodes": (1, MANY, "Node"),
        "initializers": (5, MANY, "Tensor"),
        "sparse_initializers": (15, MANY, "Sparse"),
    },
    "Node": {"attributes": (5, MANY, "Attribute")},
    "Attribute": {
        "tensor": (5, ONE, "Tensor"),
        "graph": (6, ONE, "Graph"),
        "tensors": (10, MANY, "Tensor"),
        "graphs": (11, MANY, "Graph"),
        "sparse": (22, ONE, "Sparse"),
        "sparses": (23, MANY, "Sparse"),
    },
    "Sparse": {"values": (1, ONE, "Tensor"), "indices": (2, ONE, "Tensor")},
    "Tensor": {"name": (8, BYTES, ""), "external": (13, MANY, "Entry"), "location": (14, NUMBER, "")},
    "Entry": {"key": (1, BYTES, ""), "value": (2, BYTES, "")},
}
"""Message -> field -> (number, kind, type)."""


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


def external_data(model: bytes) -> list[External]:
    """All tensors outside of an ONNX file, in subgraphs and functions too.

    Raises:
        ValueError: it is no ONNX file, nests too deep, names what is no UTF-8, or an offset is no number.
    """
    try:
        parsed = _model_class().FromString(model)
    except (DecodeError, RecursionError) as error:
        raise ValueError(f"not a whole ONNX file: {error}") from error
    if not parsed.HasField("graph"):
        raise ValueError("not an ONNX file: it has no graph")
    return [_external(tensor) for tensor in _tensors(parsed) if tensor.location == EXTERNAL or tensor.external]


def _tensors(message: Any) -> Iterator[Any]:
    """Iterative: protobuf bounds how deep a file nests, and Python's stack is not to bound it again."""
    pending: list[Message] = [message]
    while pending:
        current = pending.pop()
        if current.DESCRIPTOR.name == "Tensor":
            yield current
            continue
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
    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in FIELDS.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind, of) in fields.items():
            field = declared.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if kind == MANY else kinds.LABEL_OPTIONAL
            if of:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{of}"
            else:
                field.type = kinds.TYPE_BYTES if kind == BYTES else kinds.TYPE_INT32
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.Model"))
