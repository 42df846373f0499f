"""ONNX files that others may have made, as graphs to look at."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from dexport.errors import InputError
from dexport.onnx_reader import OnnxFile


def read_graph(path: Path) -> ir.Model:
    """Check that a file is valid ONNX of a measure, and read it; its weights stay on the disk.

    Raises:
        InputError: it is not.
    """
    try:
        OnnxFile(path.read_bytes()).check_expansion()
        onnx.checker.check_model(str(path))
        proto = onnx.load(path, load_external_data=False)
        _check_text(proto)
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        return model
    except Exception as error:  # a damaged file makes the parsers raise anything at all
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}", hint="build or export it again") from error


def _check_text(model: Message) -> None:
    """Refuse strings that are no UTF-8: protobuf hands them out as bytes, and fails only where they are written."""
    pending = [model]
    while pending:
        for field, value in pending.pop().ListFields():
            items = [value] if isinstance(value, str | bytes | Message) else value
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                pending += items
            elif field.type == FieldDescriptor.TYPE_STRING and any(isinstance(item, bytes) for item in items):
                raise ValueError(f"a {field.name} is no text")
