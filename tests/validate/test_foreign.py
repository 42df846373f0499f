"""ONNX files that something else made, held to a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from dexport.cli import main
from dexport.errors import GateError, InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.validate.foreign import NOT_RUN, validate_foreign

CHECKPOINT = str(Path(__file__).parents[2] / "checkpoints" / "dit-fashion-s.safetensors")


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
    command = ["validate", str(foreign), "--recipe", "dit-fashion-s", "--checkpoint", CHECKPOINT]
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
    assert CliRunner().invoke(main, ["validate", str(foreign)]).exit_code == UsageError.exit_code
