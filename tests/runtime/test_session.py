"""Sessions: named inputs and outputs, refusals that say what is wrong, and bundles that are checked first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import dexport
from dexport.bundle import MODEL, MODEL_DATA, Draft
from dexport.contract import Graph, Port, to_json
from dexport.errors import InputError, MachineError, UsageError
from dexport.runtime.session import OnnxSession, open_bundle

WIDTH = 4
LABELS = 3
GRAPH = Graph(
    (
        Port("x", "float32", ("B", WIDTH)),
        Port("t", "float64", ("B",)),
        Port("y", "int64", ("B",)),
        Port("scale", "float32", ()),
    ),
    (Port("out", "float32", ("B", WIDTH)), Port("aux", "float64", ("B",))),
)
"""What a manifest says of it."""


def small_model() -> onnx.ModelProto:
    """out = x * scale + table[y], aux = t + t: two outputs, a symbolic batch, a scalar input."""
    table = np.arange(LABELS * WIDTH, dtype=np.float32).reshape(LABELS, WIDTH)
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Gather", ["table", "y"], ["row"]),
        helper.make_node("Add", ["scaled", "row"], ["out"]),
        helper.make_node("Add", ["t", "t"], ["aux"]),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("x", TensorProto.FLOAT, ["B", WIDTH]),
        value("t", TensorProto.DOUBLE, ["B"]),
        value("y", TensorProto.INT64, ["B"]),
        value("scale", TensorProto.FLOAT, []),
    ]
    outputs = [value("out", TensorProto.FLOAT, ["B", WIDTH]), value("aux", TensorProto.DOUBLE, ["B"])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, [numpy_helper.from_array(table, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / MODEL
    onnx.save(small_model(), path)
    return path


@pytest.fixture(scope="module")
def session(model_path: Path) -> OnnxSession:
    return OnnxSession(model_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with Draft(tmp_path / "out") as draft:
        onnx.save(small_model(), draft.path / MODEL, save_as_external_data=True, location=MODEL_DATA, size_threshold=0)
        return draft.commit({"status": "passed", "networks": {"network": {"graphs": {"model": to_json(GRAPH)}}}}).path


def inputs(batch: int = 2, **changed: Any) -> dict[str, Any]:
    arrays = {
        "x": np.ones((batch, WIDTH), np.float32),
        "t": np.arange(batch, dtype=np.float64),
        "y": np.zeros(batch, np.int64),
        "scale": np.float32(3),
    }
    return {**arrays, **changed}


# Running


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_outputs_come_by_name(session: OnnxSession, batch: int) -> None:
    results = session(**inputs(batch, y=np.full(batch, 2)))
    assert list(results) == session.outputs == ["out", "aux"]
    np.testing.assert_array_equal(results["out"], np.tile(3.0 + np.arange(8, 12), (batch, 1)).astype(np.float32))
    np.testing.assert_array_equal(results["aux"], 2.0 * np.arange(batch))


def test_order_of_the_arguments_does_not_matter(session: OnnxSession) -> None:
    forward = session(**inputs())
    backward = session(**dict(reversed(inputs().items())))
    np.testing.assert_array_equal(forward["out"], backward["out"])


def test_layout_of_the_arrays_does_not_matter(session: OnnxSession) -> None:
    x = np.arange(8, dtype=np.float32).reshape(WIDTH, 2).T
    plain = session(**inputs(x=np.ascontiguousarray(x)))["out"]
    np.testing.assert_array_equal(session(**inputs(x=x))["out"], plain)
    np.testing.assert_array_equal(session(**inputs(x=x.astype(">f4").view(">f4")))["out"], plain)


def test_lists_are_arrays_where_their_dtype_fits(session: OnnxSession) -> None:
    results = session(**inputs(t=[1.0, 2.0], y=[0, 1]))
    np.testing.assert_array_equal(results["aux"], [2.0, 4.0])


def test_runner_names_what_runs(session: OnnxSession) -> None:
    assert session.runner == f"ONNX Runtime {ort.__version__}, CPUExecutionProvider"


def test_inputs_are_known(session: OnnxSession) -> None:
    assert list(session.inputs) == ["x", "t", "y", "scale"]


# Inputs that do not fit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "got nothing"),
        ({"x": np.ones((2, WIDTH), np.float32)}, "got x"),
        (inputs(extra=1), "got x, t, y, scale, extra"),
    ],
)
def test_missing_and_unknown_inputs(session: OnnxSession, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"^this model takes x, t, y, scale; {words}$"):
        session(**given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.ones((2, WIDTH + 1), np.float32), "input x has shape [2, 5], expected ['B', 4]"),
        ("x", np.ones(WIDTH, np.float32), "input x has shape [4], expected ['B', 4]"),
        ("t", np.float64(1), "input t has shape [], expected ['B']"),
        ("scale", np.ones(1, np.float32), "input scale has shape [1], expected []"),
        ("x", np.ones((2, WIDTH), np.float64), "input x has dtype float64, expected tensor(float)"),
        ("x", np.ones((2, WIDTH), np.float16), "input x has dtype float16, expected tensor(float)"),
        ("t", np.ones(2, np.float32), "input t has dtype float32, expected tensor(double)"),
        ("y", np.zeros(2, np.int32), "input y has dtype int32, expected tensor(int64)"),
        ("y", ["a", "b"], "input y has dtype str"),
        ("scale", 3.0, "input scale has dtype float64, expected tensor(float)"),
        ("t", np.zeros(3), "input t has B = 3, but an input before it has 2"),
        ("y", np.zeros(1, np.int64), "input y has B = 1, but an input before it has 2"),
    ],
)
def test_input_that_does_not_fit_is_named(session: OnnxSession, name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        session(**inputs(**{name: value}))


def test_values_out_of_range_are_refused(session: OnnxSession) -> None:
    with pytest.raises(UsageError, match=r"ONNX Runtime refuses these inputs: .*out of data bounds"):
        session(**inputs(y=np.array([0, LABELS])))


# Providers


def test_absent_provider_names_the_package(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MachineError, match="has no CUDAExecutionProvider; it has CPUExecutionProvider") as caught:
        OnnxSession(model_path, "cuda")
    assert "dexport[gpu]" in caught.value.hint


def test_unknown_provider(model_path: Path) -> None:
    with pytest.raises(UsageError, match="no provider 'tpu'") as caught:
        OnnxSession(model_path, "tpu")
    assert caught.value.hint == "choose from cpu, cuda"


def test_silent_fallback_to_another_provider_is_an_error(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    open_on_cpu = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda path, options, providers: open_on_cpu(path, options, providers=["CPUExecutionProvider"]),  # noqa: ARG005
    )
    with pytest.raises(
        MachineError, match="CUDAExecutionProvider was asked for, but CPUExecutionProvider runs"
    ) as caught:
        OnnxSession(model_path, "cuda")
    assert "dexport doctor" in caught.value.hint


# Files


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(100)])
def test_unloadable_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / MODEL
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"ONNX Runtime cannot load {re.escape(str(path))}") as caught:
        OnnxSession(path)
    assert "build it again" in caught.value.hint


def test_absent_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load"):
        OnnxSession(tmp_path / MODEL)


def test_model_whose_weights_are_absent(bundle: Path) -> None:
    (bundle / MODEL_DATA).unlink()
    with pytest.raises(InputError, match="cannot load"):
        OnnxSession(bundle / MODEL)


# Bundles


@pytest.mark.parametrize("open_it", [dexport.load, open_bundle])
def test_bundle_is_opened(bundle: Path, open_it: Any) -> None:
    for path in (bundle, str(bundle)):
        assert open_it(path)(**inputs())["out"].shape == (2, WIDTH)


@pytest.mark.parametrize("open_it", [dexport.load, open_bundle])
@pytest.mark.parametrize("name", [MODEL, MODEL_DATA])
def test_tampered_bundle_is_refused_before_it_is_read(
    bundle: Path, open_it: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(bytes(data))
    monkeypatch.setattr(ort, "InferenceSession", pytest.fail)
    with pytest.raises(InputError, match=f"{name}: sha256 differs"):
        open_it(bundle)


def test_bundle_with_an_extra_file_is_refused(bundle: Path) -> None:
    (bundle / "extra.bin").touch()
    with pytest.raises(InputError, match=r"extra\.bin: not in the manifest"):
        dexport.load(bundle)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a bundle"):
        dexport.load(tmp_path)


def test_bundle_runs_where_torch_and_onnx_are_absent(bundle: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "import dexport, numpy as np\n"
        "session = dexport.load(sys.argv[1])\n"
        "x = np.ones((1, 4), np.float32)\n"
        "print(session(x=x, t=np.ones(1), y=np.zeros(1, np.int64), scale=np.float32(2))['out'].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[[2.0, 3.0, 4.0, 5.0]]", 0)
