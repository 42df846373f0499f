"""The gate: it passes what is right, and catches what is planted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import dexport
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from dexport.exporter.weights.source import WeightSource
from dexport.validate.levels.forward import batch_sizes, check_parity, row_order
from dexport.validate.report.parity_table import COLUMNS, markdown, rows

SETTINGS = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "input_size": 8}
MAX_BATCH = 6


@pytest.fixture(scope="module")
def variant() -> Variant:
    return resolve(find_recipe("dit-s-2"), SETTINGS)


@pytest.fixture(scope="module")
def weights(variant: Variant) -> WeightSource:
    return open_weights(None, variant.meta_module(), seed=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "out"
    dexport.build("dit-s-2", path, settings=SETTINGS, seed=1, parity=False)
    return path


def parity(variant: Variant, weights: WeightSource, path: Path, precision: str = "fp32"):
    return check_parity(variant, weights, path, precision=precision, max_batch=MAX_BATCH)


@pytest.fixture
def planted(built: Path, tmp_path: Path):
    """A function that edits the model in place and returns the path of the damaged copy."""

    def plant(edit) -> Path:
        model = onnx.load(built / "model.onnx")
        edit(model.graph)
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return path

    return plant


def test_a_right_export_passes_at_every_batch(variant, weights, built) -> None:
    report = parity(variant, weights, built / "model.onnx")
    assert report.passed
    assert {(c.kind, c.batch) for c in report.checks} >= {("as shipped", b) for b in batch_sizes(MAX_BATCH)}
    assert any(c.kind == "batch consistency" for c in report.checks)
    assert report.timesteps == (999.0, 666.0, 333.0, 0.0)


def one_percent(graph: onnx.GraphProto) -> None:
    tensor = next(t for t in graph.initializer if t.name == "blocks.1.mlp.fc1.weight.T")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))


def wrong_gelu(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]


def wrong_epsilon(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-2


def swapped_modulation(graph: onnx.GraphProto) -> None:
    split = next(n for n in graph.node if n.name == "blocks.0/Split")
    split.output[0], split.output[1] = split.output[1], split.output[0]


def not_a_number(graph: onnx.GraphProto) -> None:
    tensor = next(t for t in graph.initializer if t.name == "final_layer.linear.bias")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * float("nan"), tensor.name))


def mixed_rows(graph: onnx.GraphProto) -> None:
    """Every row sees the label of the first row."""
    gather = next(n for n in graph.node if n.op_type == "Gather")
    first = numpy_helper.from_array(numpy_helper.to_array(onnx.helper.make_tensor("z", 7, [1], [0])), "zero")
    graph.initializer.append(first)
    pick = onnx.helper.make_node("Gather", ["y", "zero"], ["y0"], name="pick")
    gather.input[1] = "y0"
    graph.node.insert(0, pick)


@pytest.mark.parametrize(
    "fault", [one_percent, wrong_gelu, wrong_epsilon, swapped_modulation, not_a_number, mixed_rows]
)
def test_planted_faults_fail(variant, weights, planted, fault) -> None:
    report = parity(variant, weights, planted(fault))
    assert not report.passed
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["passed"] is False
    assert report.summary()["passed"] is False


def test_a_fault_between_rows_shows_as_inconsistency(variant, weights, planted) -> None:
    report = parity(variant, weights, planted(mixed_rows))
    assert any(not c.passed for c in report.checks if c.kind == "batch consistency")


@pytest.mark.parametrize(("precision", "kinds"), [("fp16", {"as shipped", "rounded"}), ("bf16", {"rounded"})])
def test_half_precision_is_judged_with_explicit_rounding(tmp_path, precision: str, kinds: set[str]) -> None:
    result = dexport.build("dit-s-2", tmp_path / "out", settings=SETTINGS, precision=precision)
    assert result.verdict.passed
    assert {c.kind for c in result.verdict.checks} - {"batch consistency"} == kinds
    assert bool(result.verdict.not_run) == (precision == "bf16")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "reports",
    ]


def test_a_failed_gate_marks_the_bundle_and_exits_1(tmp_path: Path) -> None:
    (tmp_path / "strict.py").write_text(
        "from dataclasses import replace\n"
        "from dexport.exporter.recipes import find_recipe\n"
        "RECIPE = replace(find_recipe('dit-s-2'), name='strict', gates={'fp16': 1e-6})\n"
    )
    arguments = ["build", str(tmp_path / "strict.py"), "--fp16", "-o", str(tmp_path / "out")]
    for name, value in SETTINGS.items():
        arguments += ["--set", f"{name}={value}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "FAIL" in result.output
    bundle = load_bundle(tmp_path / "out")
    assert bundle.failed
    assert bundle.network.entry()["parity"]["passed"] is False


def test_without_parity_the_bundle_says_so(built: Path) -> None:
    bundle = load_bundle(built)
    assert bundle.status == bundle.network.status == "not verified"
    assert bundle.network.entry()["parity"]["passed"] is None


@given(st.integers(1, 64))
def test_batches_cover_one_two_a_middle_and_the_maximum(maximum: int) -> None:
    sizes = batch_sizes(maximum)
    assert sizes == sorted(set(sizes))
    assert {1, min(2, maximum), maximum} <= set(sizes)
    assert maximum < 4 or any(2 < size < maximum for size in sizes)


def test_rows_change_slots_between_batches() -> None:
    slots = {}
    for batch in batch_sizes(MAX_BATCH):
        for slot, row in enumerate(row_order(batch, 4)):
            slots.setdefault(row, set()).add(slot)
    assert all(len(found) > 1 for found in slots.values())


def test_views_show_every_check(variant, weights, built) -> None:
    report = parity(variant, weights, built / "model.onnx")
    page = markdown(replace(report, not_run=("x: because",)), "dit-s-2", "RANDOM weights")
    assert len(rows(report)) == len(report.checks)
    assert all(len(row) == len(COLUMNS) for row in rows(report))
    assert "**Passed**" in page
    assert "RANDOM weights" in page
    assert "Not run: x: because." in page
