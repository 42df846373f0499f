"""Passes that a build can do without: the graph computes the same without each of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dexport.errors import UsageError
from dexport.exporter.export import convert
from dexport.exporter.passes import SWITCHABLE, check_switchable, op_histogram
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from tests.exporter.passes.model import run
from tests.golden import assert_golden

CASES = {
    "dit": ("dit-s-2", {"hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 5}, (4, 4)),
    "dico": ("dico-s", {"hidden_size": 8, "depth": [1, 0, 1, 0, 1], "num_classes": 5}, (4, 8)),
}
LEFT = {
    "share-halves": ("dit", "Concat"),
    "attention-on-tokens": ("dit", "Transpose"),
    "channels-last": ("dico", "Transpose"),
}
"""A case, and an operator that the pass changes the number of."""


@pytest.fixture(scope="module")
def traced() -> dict[str, tuple[Variant, ir.Model]]:
    graphs = {}
    for name, (recipe, settings, latent) in CASES.items():
        variant = resolve(find_recipe(recipe), settings, latent, ["guided"])
        graphs[name] = variant, trace(variant, open_weights(None, variant.meta_module()))
    return graphs


def finished(case: tuple[Variant, ir.Model], *without: str) -> ir.Model:
    """As for a quantised build of no layer."""
    variant, model = case
    model, _ = convert(
        model.clone(), variant, precision="fp32", islands=Islands(()), ternary=None, without=without, quantised=()
    )
    AttachFunctions()(model)
    return model


@pytest.mark.parametrize("without", SWITCHABLE)
@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed_without(traced: dict[str, tuple[Variant, ir.Model]], name: str, without: str) -> None:
    feed = {key: np.asarray(array) for key, array in traced[name][0].signature.example(2).items()}
    expected = run(finished(traced[name]), feed)[0]
    assert_golden(run(finished(traced[name], without), feed)[0], expected)


@pytest.mark.parametrize(("without", "case"), LEFT.items())
def test_a_pass_that_is_left_out_does_not_run(
    traced: dict[str, tuple[Variant, ir.Model]], without: str, case: tuple[str, str]
) -> None:
    name, op = case
    with_it, without_it = (op_histogram(finished(traced[name], *names)).get(op, 0) for names in ((), (without,)))
    assert with_it != without_it


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="no pass 'magic'") as caught:
        check_switchable(["share-halves", "magic"])
    assert all(name in str(caught.value.hint) for name in SWITCHABLE)
