"""ONNX files that something else made, held to a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from dexport.cli import main
from dexport.errors import GateError, InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.validate.levels.forward import ParityReport
from dexport.validate.onnx_file.foreign import NOT_RUN, validate_foreign

CHECKPOINT = str(Path(__file__).parents[3] / "checkpoints" / "dit-fashion-s.safetensors")


@pytest.fixture
def foreign(trained: Path, tmp_path: Path) -> Path:
    """The graph with names of its own, in one file, as other exporters write it."""
    model = onnx.load(trained / "model.onnx")
    names = {"x": "sample", "t": "timestep", "y": "class_labels", "out": "noise_pred"}
    for value in [*model.graph.input, *model.graph.output]:
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    return path


def test_a_file_with_other_names_passes(foreign: Path) -> None:
    report = validate_foreign(foreign, find_recipe("dit-fashion-s"), CHECKPOINT)
    assert report.passed
    assert report.not_run == (NOT_RUN,)
    assert sorted({check.batch for check in report.checks}) == [1, 2, 3, 4]


def test_one_changed_weight_fails(foreign: Path) -> None:
    model = onnx.load(foreign)
    weight = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, foreign)
    command = ["compare", str(foreign), "--recipe", "dit-fashion-s", "--checkpoint", CHECKPOINT]
    result = CliRunner().invoke(main, [*command, "--json", "-o", str(foreign.with_suffix(".json"))])
    assert result.exit_code == GateError.exit_code
    assert json.loads(result.stdout) == json.loads(foreign.with_suffix(".json").read_text())
    assert json.loads(result.stdout)["passed"] is False


def test_what_does_not_fit_is_told(foreign: Path, trained: Path, tmp_path: Path) -> None:
    recipe = find_recipe("dit-fashion-s")
    with pytest.raises(InputError, match="the recipe has z"):
        validate_foreign(foreign, find_recipe("sd-vae-decoder"), None)
    with pytest.raises(InputError, match="does not fit this model"):
        validate_foreign(foreign, find_recipe("dit-fashion"), CHECKPOINT)
    with pytest.raises(UsageError, match="does not exist"):
        validate_foreign(tmp_path / "missing.onnx", recipe, CHECKPOINT)
    shutil.copy(trained / "manifest.json", tmp_path / "text.onnx")
    with pytest.raises(InputError, match="cannot load"):
        validate_foreign(tmp_path / "text.onnx", recipe, CHECKPOINT)
    assert CliRunner().invoke(main, ["compare", str(foreign)]).exit_code == UsageError.exit_code
    refused = CliRunner().invoke(main, ["validate", str(foreign)])
    assert refused.exit_code == UsageError.exit_code
    assert f"fix: dexport compare {foreign} --recipe NAME" in refused.stderr
    refused = CliRunner().invoke(main, ["compare", str(trained), "--recipe", "dit-fashion-s"])
    assert refused.exit_code == UsageError.exit_code
    assert f"dexport validate {trained}" in refused.stderr


def changed(foreign: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    model = onnx.load(foreign)
    change(model.graph)
    path = foreign.with_name("changed.onnx")
    onnx.save(model, path)
    return path


def held(path: Path, ports: dict[str, str] | None = None) -> ParityReport:
    return validate_foreign(path, find_recipe("dit-fashion-s"), CHECKPOINT, ports=ports)


def in_type(name: str, dtype: int) -> Callable[[onnx.GraphProto], None]:
    """An input in another type, which the graph casts."""

    def change(graph: onnx.GraphProto) -> None:
        port = next(value for value in graph.input if value.name == name)
        before = port.type.tensor_type.elem_type
        port.type.tensor_type.elem_type = dtype
        for node in graph.node:
            node.input[:] = ["cast" if given == name else given for given in node.input]
        graph.node.insert(0, helper.make_node("Cast", [name], ["cast"], to=before))

    return change


@pytest.mark.parametrize(
    ("name", "dtype", "passes"),
    [
        ("sample", TensorProto.FLOAT16, True),
        ("sample", TensorProto.DOUBLE, True),
        ("class_labels", TensorProto.INT32, True),
        ("timestep", TensorProto.INT64, False),
        ("class_labels", TensorProto.FLOAT, False),
        ("sample", TensorProto.BFLOAT16, False),
    ],
)
def test_other_types_are_cast_and_told_or_refused(foreign: Path, name: str, dtype: int, passes: bool) -> None:
    path = changed(foreign, in_type(name, dtype))
    if passes:
        report = held(path)
        assert report.passed
        assert any(name in note and "cast" in note for note in report.notes)
        assert report.precision == ("fp16" if dtype == TensorProto.FLOAT16 else "fp32")
        assert max(check.metrics.relative_l2 for check in report.checks) < 5e-6
    else:
        with pytest.raises(InputError, match=name):
            held(path)


def test_names_that_match_in_part_need_a_mapping(trained: Path) -> None:
    path = trained / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    assert [value.name for value in model.graph.input] == ["x", "t", "y"]
    with pytest.raises(UsageError, match="the file has no sample"):
        held(path, {"x": "sample"})
    assert held(path, {"x": "x"}).notes == ()


def behind(graph: onnx.GraphProto, last: onnx.NodeProto) -> None:
    """One more node between the network's output, now ``before``, and the graph's."""
    for node in graph.node:
        node.output[:] = ["before" if name == "noise_pred" else name for name in node.output]
    graph.node.append(last)


def test_a_file_that_does_not_keep_its_word_is_refused(foreign: Path) -> None:
    def doubles(graph: onnx.GraphProto) -> None:
        behind(graph, helper.make_node("Concat", ["before", "before"], ["noise_pred"], axis=0))

    with pytest.raises(InputError, match=r"noise_pred has shape \[2, 8, 16, 16\] at batch 1") as caught:
        held(changed(foreign, doubles))
    assert "\n" not in str(caught.value)


def test_a_batch_that_only_the_graph_fixes_is_kept(foreign: Path) -> None:
    def widens(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.full((2, 1, 1, 1), 1e-30, np.float32), "two"))
        behind(graph, helper.make_node("Add", ["before", "two"], ["noise_pred"]))

    report = held(changed(foreign, widens))
    assert report.passed and {check.batch for check in report.checks} == {2}


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.99])
def test_damaged_files_are_one_line(foreign: Path, keep: float) -> None:
    content = foreign.read_bytes()
    foreign.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(InputError, match="cannot load") as caught:
        held(foreign)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
