"""Chosen integers: a near tie costs next to nothing, another choice as much as it is worse, and all are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import dexport
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from dexport.exporter.weights.source import WeightSource
from dexport.validate.levels.choices import Choices
from dexport.validate.levels.forward import ParityReport, check_parity
from dexport.validate.onnx_file.foreign import validate_foreign

SETTINGS = {
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 16,
    "codebook_size": 300,
    "codebook_embed_dim": 6,
}
EXPECTED = np.array([[0, 2], [1, 1]])
SCORES = np.array([[[1, 5, 1.001, 9], [5, 3, 1, 7]], [[4, 0, 4, 0], [4, 0, 4, 0]]], np.float32)


def choices() -> Choices:
    return Choices({"codes": EXPECTED, "other": EXPECTED}, {"codes": SCORES})


def test_what_is_the_same_is_worth_the_same() -> None:
    counted = choices()
    wanted, found = counted.worth("as shipped", "codes", EXPECTED[[1, 0, 1]], [1, 0, 1])
    np.testing.assert_array_equal(wanted, found)
    assert list(counted.notes) == ["codes, as shipped: all 6 choices are PyTorch's"]


def test_another_choice_costs_as_much_as_it_is_worse() -> None:
    counted = choices()
    wanted, found = counted.worth("rounded", "codes", np.array([[2, 1], [0, 3]]), [0, 1])
    np.testing.assert_allclose(wanted - found, [[0.001 / 3, 2 / 3], [2, 0]], rtol=1e-3)
    (note,) = counted.notes
    assert note.startswith("codes, rounded: 4 of 4 choices are not PyTorch's; by its scores the worst is 2e+02 % ")


@pytest.mark.parametrize("none", [-1, 4])
def test_a_choice_that_there_is_not_is_worth_nothing(none: int) -> None:
    _, found = choices().worth("as shipped", "codes", np.array([[0, none]]), [0])
    assert np.isneginf(found).tolist() == [[False, True]]


def test_where_all_score_the_same_any_choice_will_do() -> None:
    counted = Choices({"codes": EXPECTED}, {"codes": np.ones_like(SCORES)})
    _, found = counted.worth("as shipped", "codes", np.array([[3, 3], [3, 3]]), [0, 1])
    assert (found == 1).all()


def test_outputs_without_scores_are_compared_as_they_are() -> None:
    counted = choices()
    wanted, found = counted.worth("as shipped", "other", np.array([[7, 7]]), [1])
    assert (wanted.tolist(), found.tolist()) == ([[1, 1]], [[7, 7]])
    assert not list(counted.notes)


@pytest.fixture(scope="module")
def variant() -> Variant:
    return resolve(find_recipe("llamagen-vq16-encoder"), SETTINGS, (16, 16))


@pytest.fixture(scope="module")
def weights(variant: Variant) -> WeightSource:
    return open_weights(None, variant.meta_module(), seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("choices") / "out"
    options = {"settings": SETTINGS, "latent": (16, 16), "seed": 1, "parity": False}
    dexport.build("llamagen-vq16-encoder", path, **options)
    return onnx.load(path / "model.onnx")


def judged(model: onnx.ModelProto, edit, variant, weights, path: Path, precision: str, limit: float) -> ParityReport:
    """The parity of a copy whose codebook was edited."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    (codebook,) = [tensor for tensor in changed.graph.initializer if list(tensor.dims) == [300, 6]]
    codebook.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(codebook)), codebook.name))
    onnx.save(changed, path)
    return check_parity(variant, weights, path, precision=precision, max_batch=2, limit=limit)


def noisy(codebook: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(codebook.shape).astype(np.float32)
    return codebook * (1 + 0.02 * noise)


def rolled(codebook: np.ndarray) -> np.ndarray:
    return np.roll(codebook, 1, axis=0)


def test_near_ties_are_within_the_gate_of_what_rounds_and_are_counted(model, variant, weights, tmp_path) -> None:
    report = judged(model, noisy, variant, weights, tmp_path / "model.onnx", "fp32", 2e-2)
    assert report.passed
    assert 0 < report.loss.relative_l2 < 1e-2
    (note,) = report.notes
    assert "of 192 choices are not PyTorch's" in note
    assert not judged(model, noisy, variant, weights, tmp_path / "model.onnx", "fp32", 5e-6).passed


def test_wrong_choices_fail(model, variant, weights, tmp_path) -> None:
    report = judged(model, rolled, variant, weights, tmp_path / "model.onnx", "fp32", 5e-2)
    assert report.status == "failed"
    assert report.loss.relative_l2 > 0.5


def test_a_file_of_something_else_is_counted_as_well(model, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    recipe = replace(find_recipe("llamagen-vq16-encoder"), config={**SETTINGS})
    report = validate_foreign(path, recipe, None, seed=1)
    assert report.passed
    assert any("choices are PyTorch's" in note for note in report.notes)
