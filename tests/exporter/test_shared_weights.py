"""Several graphs of one network: one weights file, which grows by nothing but what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import dexport
from dexport.bundle import MODEL_DATA, load_bundle
from dexport.exporter.shared_weights import SharedWeights
from dexport.runtime.opened import OpenProgram
from dexport.validate.metrics import compare
from tests.bundles import NARROW
from tests.runtime.running import latents

CHOICES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {"int8": "weight"},
    "fp16 and int8": {"precision": "fp16", "int8": "weight"},
    "w8a8": {"int8": "w8a8", "calibration_images": 4},
    "ternary": {"ternary": True, "calibration_images": 4},
}


QUICK = ("fp16", "int8", "w8a8")
"""The others are built in the same ways, and take eight seconds each."""


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with the graph ``model``, and one with ``guided`` as well."""
    folder, options = tmp_path_factory.mktemp("pair"), {"settings": NARROW, "parity": False, **CHOICES[request.param]}
    dexport.build("dit-fashion", folder / "one", **options)
    dexport.build("dit-fashion", folder / "both", graphs=("model", "guided"), **options)
    return folder / "one", folder / "both"


def test_a_second_graph_adds_nothing_to_the_weights(pair: tuple[Path, Path]) -> None:
    one, both = pair
    assert sorted(load_bundle(both).network.graphs) == ["guided", "model"]
    assert (both / MODEL_DATA).read_bytes() == (one / MODEL_DATA).read_bytes()
    assert (both / "model.onnx").read_bytes() == (one / "model.onnx").read_bytes()


def test_both_graphs_compute_the_same_guidance(pair: tuple[Path, Path]) -> None:
    one, both = (OpenProgram.open(path) for path in pair)
    assert {call.graph for call in one.rehearse()} == {"model"}
    assert {call.graph for call in both.rehearse()} == {"guided"}
    assert compare(latents(one), latents(both)).relative_l2 < 5e-3  # float16 rounds at other places


def test_each_graph_is_a_session(pair: tuple[Path, Path]) -> None:
    assert "cfg_scale" not in dexport.load(pair[1]).inputs
    assert "cfg_scale" in dexport.load(pair[1], graph="guided").inputs


def model(**weights: np.ndarray) -> ir.Model:
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()]
    nodes = [ir.node("Identity", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    for output, value in zip(outputs, values, strict=True):
        output.name, output.dtype, output.shape = f"{value.name}/out", value.const_value.dtype, value.const_value.shape  # type: ignore[union-attr]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def read(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor, str(path.parent))
        for tensor in onnx.load(path).graph.initializer
    }


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    a, b = (np.random.default_rng(seed).standard_normal(100).astype(np.float32) for seed in (0, 1))
    first, file = tmp_path / "first.onnx", tmp_path / MODEL_DATA
    ir.save(model(w=a, v=b), first, external_data=MODEL_DATA)
    size = file.stat().st_size
    shared = SharedWeights(first, file)
    shared.save(model(other=b, w=a, small=np.ones(3, np.float32)), tmp_path / "second.onnx")
    assert file.stat().st_size == size
    shared.save(model(w=b, new=a + 1, again=a + 1), tmp_path / "third.onnx")
    assert file.stat().st_size == size + a.nbytes
    for name, expected in {
        "first": {"w": a, "v": b},
        "second": {"other": b, "w": a, "small": np.ones(3, np.float32)},
        "third": {"w": b, "new": a + 1, "again": a + 1},
    }.items():
        found = read(tmp_path / f"{name}.onnx")
        assert list(found) == list(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


def test_other_types_of_the_same_bytes(tmp_path: Path) -> None:
    a = np.arange(100, dtype=np.float32)
    ir.save(model(w=a), tmp_path / "first.onnx", external_data=MODEL_DATA)
    shared = SharedWeights(tmp_path / "first.onnx", tmp_path / MODEL_DATA)
    shared.save(model(w=a.view(np.int32)), tmp_path / "second.onnx")
    assert (tmp_path / MODEL_DATA).stat().st_size == a.nbytes
    np.testing.assert_array_equal(read(tmp_path / "second.onnx")["w"], a.view(np.int32))
