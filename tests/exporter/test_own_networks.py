"""Networks of a user's own: what they return is taken as declared, and what cannot be traced is said with its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dexport
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.exporter.ports import check_network
from dexport.exporter.pytorch.declared import as_declared
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from dexport.validate.levels.forward import ParityReport
from dexport.validate.references.recipe_network import torch_session
from tests.exporter import networks
from tests.exporter.networks import CHANNELS, HOSTILE, RETURNS, SIDE, ModelOutput, Network, UNet, network, recipe

SOURCE = Path(networks.__file__)


def exported(variant: Variant) -> None:
    """As far as a build goes before it writes."""
    check_network(variant)
    trace(variant, open_weights(None, variant.outline))


@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_cannot_be_traced_is_an_error_of_the_input_with_module_line_and_reason(name: str) -> None:
    constructor, said = HOSTILE[name]
    with pytest.raises(InputError) as caught:
        exported(resolve(recipe(constructor)))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert said in message
    assert "mine" in message
    assert "\n" not in message
    assert caught.value.hint
    forward = constructor.forward.__code__
    lines = [n for n, line in enumerate(SOURCE.read_text().splitlines(), start=1) if "# the line" in line]
    own = [n for n in lines if forward.co_firstlineno < n <= max(end for *_, end in forward.co_lines() if end)]
    for line in own:
        assert f"{SOURCE}:{line}" in message


def test_a_line_of_a_module_inside_is_named() -> None:
    with pytest.raises(InputError) as caught:
        exported(resolve(recipe(networks.Nested)))
    line = next(n for n, text in enumerate(SOURCE.read_text().splitlines(), 1) if "# a line of a module" in text)
    assert f"stages.1.0 (Positive), {SOURCE}:{line} `if x.mean() > 0:" in str(caught.value)
    assert "torch.where" in caught.value.hint


@pytest.mark.parametrize("graph", ["model", "guided"])
@pytest.mark.parametrize("constructor", [UNet, network(networks.on_batch)])
def test_a_guard_on_the_batch_is_found_inside_of_guidance_too(constructor: type[Network], graph: str) -> None:
    with pytest.raises(InputError, match="where B is the batch") as caught:
        exported(resolve(recipe(constructor), graphs=[graph]))
    assert str(SOURCE) in str(caught.value)


def test_the_command_ends_without_a_traceback_and_writes_nothing(tmp_path: Path) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text("from tests.exporter.networks import *\nRECIPE = recipe(network(on_value))\n")
    result = CliRunner().invoke(main, ["build", str(file), "-o", str(out)])
    assert result.exit_code == 4
    assert result.output.count("error: ") == 1
    assert "fix: a graph is the same for all values" in result.output
    assert "Traceback" not in result.output
    assert "def forward" not in result.output
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", list(RETURNS))
def test_what_is_returned_is_taken_by_name_or_place(name: str) -> None:
    variant = resolve(recipe(network(RETURNS[name])))
    weights = open_weights(None, variant.outline)
    check_network(variant)
    model = trace(variant, weights)
    assert [output.name for output in model.graph.outputs] == ["out"]
    inputs = variant.signature.example(2)
    plain = resolve(recipe())
    expected = torch_session(plain, weights)(**inputs)["out"]
    np.testing.assert_array_equal(torch_session(variant, weights)(**inputs)["out"], expected)


@pytest.mark.parametrize("name", ["dict with more", "model output"])
@pytest.mark.parametrize("options", [{}, {"guidance": "fused"}, {"precision": "auto"}, {"int8": "weight"}])
def test_a_whole_build_of_a_network_that_returns_a_mapping(name: str, options: dict[str, str], tmp_path: Path) -> None:
    result = dexport.build(recipe(network(RETURNS[name])), tmp_path / "out", profile="ci", **options)
    assert isinstance(result.verdict, ParityReport)
    assert result.verdict.passed


def test_a_unet_without_the_guard_builds(tmp_path: Path) -> None:
    result = dexport.build(recipe(lambda: UNet(guarded=False)), tmp_path / "out", profile="ci")
    assert isinstance(result.verdict, ParityReport)
    assert max(check.metrics.relative_l2 for check in result.verdict.checks) < 1e-6


def test_what_a_network_prints_is_no_result(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.exporter.networks import *\nRECIPE = recipe(network(prints))\n")
    result = CliRunner().invoke(main, ["build", str(file), "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["name"] == "mine"


@pytest.mark.parametrize(
    ("result", "names"),
    [
        ({"b": 1, "a": 0}, ["a", "b"]),
        ((0, 1), ["a", "b"]),
        ([0, 1, None], ["a", "b"]),
        (networks.Named(0, 1), ["features", "out"]),
        ({"b": 1, "c": 2, "a": 0}, ["a", "b"]),
    ],
)
def test_outputs_come_in_the_order_of_the_signature(result: object, names: list[str]) -> None:
    tensors = [torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)]

    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {name: tensors[number] for name, number in value.items()}
        if isinstance(value, networks.Named):
            return networks.Named(tensors[value.features], tensors[value.out])
        return type(value)(None if number is None else tensors[number] for number in value)  # type: ignore[attr-defined, call-arg]

    assert [int(tensor) for tensor in as_declared(filled(result), "mine", names)] == [0, 1]


@pytest.mark.parametrize(
    "result",
    [None, {}, (), {"a": {"out": torch.ones(1)}}, ({"out": 1},), (torch.ones(1), torch.ones(1)), "out", ModelOutput],
    ids=lambda result: type(result).__name__,
)
def test_other_results_are_refused(result: object) -> None:
    with pytest.raises(InputError, match="mine"):
        as_declared(result, "mine", ["out"])


@pytest.mark.parametrize("wrong", [lambda: None, lambda: 3, lambda: [Network()], lambda: Network])
def test_a_constructor_that_makes_no_module_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match=r"not a torch\.nn\.Module"):
        resolve(recipe(wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyError("width"), AssertionError(), AttributeError("x"), IndexError("list")])
def test_a_constructor_that_raises_is_refused(error: Exception) -> None:
    def constructor() -> Network:
        raise error

    with pytest.raises(UsageError, match="the constructor refuses"):
        resolve(recipe(constructor))


def test_the_shapes_of_these_networks() -> None:
    out = Network()(torch.zeros(2, CHANNELS, SIDE, SIDE), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, CHANNELS, SIDE, SIDE)
