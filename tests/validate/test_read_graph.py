"""Graphs of others: what is no text in them is refused when they are read, not when a part of them is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from dexport.errors import InputError
from dexport.validate.read_graph import read_graph

PLACE = "texthere"


def model() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    node = helper.make_node("Relu", ["x"], ["y"], name="n")
    shaped = value("x", TensorProto.FLOAT, ["B", 4]), value("y", TensorProto.FLOAT, ["B", 4])
    return helper.make_model(helper.make_graph([node], "g", [shaped[0]], [shaped[1]]), ir_version=10)


PLACES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "dimension": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", PLACE),
    "note": lambda m: setattr(m.graph.node[0], "doc_string", PLACE),
    "metadata": lambda m: m.metadata_props.add(key="k", value=PLACE) and None,
    "producer": lambda m: setattr(m, "producer_name", PLACE),
    "name": lambda m: setattr(m.graph.node[0], "name", PLACE),
}


@pytest.mark.parametrize("place", PLACES)
def test_strings_that_are_no_text(place: str, tmp_path: Path) -> None:
    made, path = model(), tmp_path / "model.onnx"
    PLACES[place](made)
    content = made.SerializeToString()
    path.write_bytes(content)
    read_graph(path)
    path.write_bytes(content.replace(PLACE.encode(), b"text\xddere"))
    with pytest.raises(InputError, match="cannot be read"):
        read_graph(path)
