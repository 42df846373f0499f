"""Reading ONNX files without onnx, held to onnx itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dexport.onnx_reader import External, OnnxFile, expanded_sizes


def outside(name: str, location: str, **numbers: int) -> TensorProto:
    tensor = helper.make_tensor(name, TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **numbers}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(*tensors: TensorProto, attributes: tuple[onnx.AttributeProto, ...] = ()) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    node.attribute.extend(attributes)
    return helper.make_model(helper.make_graph([node], "g", [], [], initializer=tensors))


def test_initializers() -> None:
    model = model_with(outside("w", "model.onnx.data", offset=64, length=4), outside("b", "../secret"))
    assert OnnxFile(model.SerializeToString()).external_data() == [
        External("b", "../secret", 0, None),
        External("w", "model.onnx.data", 64, 4),
    ]


def nested(kind: str) -> onnx.ModelProto:
    hidden = outside("hidden", "/etc/passwd")
    graph = helper.make_graph([], "inner", [], [], initializer=[hidden])
    sparse = onnx.SparseTensorProto(values=hidden)
    attributes = {
        "tensor": [helper.make_attribute("a", hidden)],
        "tensors": [helper.make_attribute("a", [hidden])],
        "graph": [helper.make_attribute("a", graph)],
        "graphs": [helper.make_attribute("a", [graph])],
        "sparse": [helper.make_attribute("a", sparse)],
    }
    if kind in attributes:
        return model_with(attributes=tuple(attributes[kind]))
    model = model_with()
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(helper.make_attribute("value", hidden))
    if kind == "function":
        model.functions.append(helper.make_function("d", "F", [], ["c"], [constant], []))
    elif kind == "training":
        model.training_info.add().algorithm.CopyFrom(graph)
    else:
        model.graph.sparse_initializer.append(sparse)
    return model


@pytest.mark.parametrize(
    "kind", ["tensor", "tensors", "graph", "graphs", "sparse", "function", "training", "sparse initializer"]
)
def test_nothing_hides(kind: str) -> None:
    assert OnnxFile(nested(kind).SerializeToString()).external_data() == [External("hidden", "/etc/passwd", 0, None)]


def test_a_real_file_matches_onnx(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.full(512, n, np.float32), f"w{n}") for n in range(3)]
    onnx.save(model_with(*weights), tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    found = OnnxFile((tmp_path / "m.onnx").read_bytes()).external_data()
    expected = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    infos = {t.name: onnx.external_data_helper.ExternalDataInfo(t) for t in expected}
    assert {one.tensor: (one.location, one.offset, one.length) for one in found} == {
        name: (info.location, info.offset or 0, info.length) for name, info in infos.items()
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"not an onnx file",
        model_with(outside("w", "f", offset=-1)).SerializeToString(),
        model_with(outside("w", "f", length=-4)).SerializeToString(),
        model_with(outside("w", "f")).SerializeToString()[:-3],
    ],
)
def test_what_is_no_model(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"ONNX file|bytes"):
        OnnxFile(content).external_data()


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_files_raise_one_error(noise: bytes, place: int) -> None:
    whole = nested("graph").SerializeToString()
    damaged = whole[:place] + noise + whole[place + len(noise) :]
    with contextlib.suppress(ValueError):
        OnnxFile(damaged).external_data()


def functions(**calls: list[str]) -> bytes:
    """A model that calls ``f0``; each function calls what is listed."""
    model = model_with()
    model.graph.node.append(helper.make_node("f0", ["x"], ["z"], domain="d"))
    for name, called in calls.items():
        nodes = [helper.make_node(one, ["x"], [f"y{n}"], domain="d") for n, one in enumerate(called)]
        model.functions.append(helper.make_function("d", name, ["x"], ["y0"], nodes, [], attributes=[]))
    return model.SerializeToString()


def test_functions_of_a_measure() -> None:
    OnnxFile(functions(f0=["f1", "f1"], f1=["Relu"] * 100)).check_expansion()
    OnnxFile(functions(**{f"f{n}": [f"f{n + 1}"] for n in range(3000)})).check_expansion()
    OnnxFile(functions(f0=["f1"] * 20, f1=["Relu"] * 20_000)).check_expansion()


@pytest.mark.parametrize("width", [2, 10])
def test_function_bombs_are_refused_at_once(width: int) -> None:
    bomb = functions(**{f"f{n}": [f"f{n + 1}"] * width for n in range(60)}, f60=["Relu"])
    with pytest.raises(ValueError, match="its functions stand for"):
        OnnxFile(bomb).check_expansion()


class Body(list[tuple[bytes, bytes]]):
    """The operators of a function, which counts how often they are read."""

    read = 0

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        self.read += 1
        return super().__iter__()


def test_a_body_is_read_twice_at_most_however_often_it_is_called() -> None:
    names = [(b"d", f"f{n}".encode()) for n in range(4)]
    bodies = {name: Body([called] * 1000) for name, called in zip(names, [*names[1:], (b"", b"Relu")], strict=True)}
    assert expanded_sizes(bodies)[names[3]] == 1000
    assert max(body.read for body in bodies.values()) <= 2


@pytest.mark.parametrize("calls", [{"f0": ["f0"]}, {"f0": ["f1"], "f1": ["f2"], "f2": ["f1"]}])
def test_circles_of_functions_are_refused(calls: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="in a circle"):
        OnnxFile(functions(**calls)).check_expansion()
