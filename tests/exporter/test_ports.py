"""Declared ports, samplers, rules and decoders are held to what there is, before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import dexport
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.exporter.ports import check_network
from dexport.exporter.recipes import all_recipes
from dexport.exporter.recipes.check import check_recipe, fits
from dexport.exporter.recipes.recipe import BATCH, Guidance, Islands, Recipe, Sampling, Signature, TensorSpec
from dexport.exporter.tracing.trace import trace
from dexport.exporter.trajectory import check_program
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights
from tests.exporter.networks import CLASSES, Network, network, recipe, signature
from tests.exporter.resolving import resolved

IMAGE = (BATCH, 3, 8, 8)
SAMPLING = Sampling("rectified flow", "velocity", "flow", 4, 1.0, "none")
GUIDANCE = Guidance("all channels", 2.0, lambda _config: CLASSES)
PLAIN = signature({}, (8, 8))


def with_ports(**changes: TensorSpec | None) -> Callable[..., Signature]:
    """The usual signature with ports exchanged by their name, left out, or added."""

    def function(_config: Mapping[str, Any], _size: tuple[int, int]) -> Signature:
        def changed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(new for spec in specs if (new := changes.get(spec.name, spec)) is not None)

        return Signature(changed(PLAIN.inputs), changed(PLAIN.outputs))

    return function


def two_channels(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return self.head(x, t, y)[:, :2]


def half_size(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return self.head(x, t, y)[..., ::2, ::2]


def flattened(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return self.head(x, t, y).flatten(1)


def in_double(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return self.head(x, t, y).double()


def of_labels(_self: Network, _x: Tensor, _t: Tensor, y: Tensor) -> Tensor:
    return y


def one_row(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return self.head(x, t, y)[:1]


def mean_of_batch(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return self.head(x, t, y).mean(dim=0)


def doubled_batch(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([self.head(x, t, y)] * 2)


RETURNED = {
    two_channels: "float32 ['B', 2, 8, 8]",
    half_size: "float32 ['B', 3, 4, 4]",
    flattened: "float32 ['B', 192]",
    in_double: "float64 ['B', 3, 8, 8]",
    of_labels: "int64 ['B']",
    one_row: "float32 [1, 3, 8, 8]",
    mean_of_batch: "float32 [3, 8, 8]",
    doubled_batch: "float32 [6, 3, 8, 8]",
}


@pytest.mark.parametrize("forward", list(RETURNED), ids=lambda forward: forward.__name__)
def test_a_network_that_returns_something_else_is_refused(forward: Callable[..., Tensor]) -> None:
    variant = resolve(recipe(network(forward)))
    with pytest.raises(InputError) as caught:
        check_network(variant)
    message = str(caught.value)
    assert message == (
        "mine: output out is declared as float32 ['B', 3, 8, 8], and the network returns " + RETURNED[forward]
    )


@pytest.mark.parametrize("forward", [two_channels, flattened, in_double, one_row, mean_of_batch])
def test_the_traced_graph_is_held_to_its_signature_too(forward: Callable[..., Tensor]) -> None:
    variant = resolve(recipe(network(forward)))
    with pytest.raises(InputError, match=r"mine: output out is declared as float32 \['B', 3, 8, 8\]"):
        trace(variant, open_weights(None, variant.outline))


def test_nothing_is_written_and_no_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dexport.exporter.network_build.open_weights", lambda *_, **__: pytest.fail("work was done"))
    out = tmp_path / "out"
    with pytest.raises(InputError):
        dexport.build(recipe(network(two_channels)), out, precision="auto")
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sampler": ({"sampling": replace(SAMPLING, sampler="euler")}, "no sampler 'euler'"),
    "steps of the sampler": ({"sampling": replace(SAMPLING, sampler="ddpm", steps=5000)}, "5000"),
    "decoder": ({"sampling": replace(SAMPLING, decoder="my-vae")}, "no decoder 'my-vae'"),
    "shuffle": ({"sampling": replace(SAMPLING, decoder="pixel-shuffle-x")}, "pixel-shuffle-x"),
    "shuffle of too few channels": ({"sampling": replace(SAMPLING, decoder="pixel-shuffle-2")}, "3 channels"),
    "rule": ({"guidance": replace(GUIDANCE, rule="every channel")}, "no guidance rule 'every channel'"),
    "power": ({"guidance": replace(GUIDANCE, rule="all channels, power-cosine over time, power x")}, "power x"),
    "rule that fails": ({"guidance": replace(GUIDANCE, rule=lambda config: config["rule"])}, "KeyError"),
    "null label below": ({"guidance": replace(GUIDANCE, null_label=lambda _: -1)}, "null label -1"),
    "null label of a class": ({"guidance": replace(GUIDANCE, null_label=lambda _: 3)}, "null label 3"),
    "null label above": ({"guidance": replace(GUIDANCE, null_label=lambda _: CLASSES + 1)}, "rows 0 to 10"),
    "null label that fails": ({"guidance": replace(GUIDANCE, null_label=lambda c: c["classes"])}, "KeyError"),
    "null label of another kind": ({"guidance": replace(GUIDANCE, null_label=lambda _: "null")}, "'null'"),
    "labels above": (
        {"signature": with_ports(y=TensorSpec("y", "int64", (BATCH,), "integers", 0, 999)), "guidance": None},
        "999",
    ),
    "an input that nothing feeds": (
        {"signature": with_ports(y=TensorSpec("text", "int64", (BATCH,))), "guidance": None},
        "nothing feeds the input text",
    ),
    "no time": ({"signature": with_ports(t=None)}, "none of the inputs x, y is a time"),
    "another order": (
        {"signature": lambda *_: Signature(PLAIN.inputs[::-1], PLAIN.outputs)},
        "inputs y, t, x are declared",
    ),
    "another state": ({"signature": with_ports(x=TensorSpec("x", "float32", (BATCH, 3, 16, 16)))}, "16, 16"),
    "a state of tokens": (
        {"signature": with_ports(x=TensorSpec("x", "float32", (BATCH, 64, 3)))},
        "a state is float32 of 4",
    ),
    "times per pixel": ({"signature": with_ports(t=TensorSpec("t", "float32", (BATCH, 8)))}, "a time is float32 of 1"),
    "times in integers": ({"signature": with_ports(t=TensorSpec("t", "int64", (BATCH,)))}, "a time is float32"),
    "labels in floats": ({"signature": with_ports(y=TensorSpec("y", "float32", (BATCH,)))}, "a label is int64"),
    "another output": (
        {"signature": with_ports(out=TensorSpec("eps", "float32", IMAGE))},
        "none of the outputs eps is a prediction",
    ),
    "a variance that its sampler has not": (
        {"signature": with_ports(out=TensorSpec("out", "float32", (BATCH, 6, 8, 8)))},
        "predictions of 3 channels",
    ),
    "an odd variance": (
        {
            "signature": with_ports(out=TensorSpec("out", "float32", (BATCH, 5, 8, 8))),
            "sampling": replace(SAMPLING, sampler="ddpm"),
        },
        "predictions of 3 or 6 channels",
    ),
    "guidance without labels": ({"signature": with_ports(y=None)}, "no labels"),
    "a name twice": ({"signature": with_ports(out=TensorSpec("x", "float32", IMAGE))}, "used twice"),
    "no name": ({"signature": with_ports(out=TensorSpec("the picture", "float32", IMAGE))}, "identifier"),
    "no outputs": ({"signature": with_ports(out=None)}, "no outputs"),
    "an empty dimension": ({"signature": with_ports(x=TensorSpec("x", "float32", (BATCH, 0, 8, 8)))}, "port x"),
    "an unknown symbol": ({"signature": with_ports(x=TensorSpec("x", "float32", ("N", 3, 8, 8)))}, "port x"),
    "a batch elsewhere": ({"signature": with_ports(x=TensorSpec("x", "float32", (3, BATCH, 8, 8)))}, "port x"),
    "stratified pixels": (
        {"signature": with_ports(x=TensorSpec("x", "float32", IMAGE, "stratified", 0.0, 1.0))},
        "stratified",
    ),
    "an empty range": ({"signature": with_ports(y=TensorSpec("y", "int64", (BATCH,), "integers", 5, 2))}, "input y"),
    "another type": ({"signature": with_ports(x=TensorSpec("x", "float16", IMAGE))}, "dtype"),  # type: ignore[arg-type]
    "a list for a shape": ({"signature": with_ports(x=TensorSpec("x", "float32", list(IMAGE)))}, "shape"),  # type: ignore[arg-type]
    "no signature": ({"signature": lambda *_: (PLAIN.inputs, PLAIN.outputs)}, "expected a Signature"),
    "a number for latent": ({"latent": 8}, "latent is 8"),
    "a list for latent": ({"latent": [8, 8]}, "latent is [8, 8]"),
    "an empty latent": ({"latent": (0, 8)}, "latent"),
    "a text for checkpoints": ({"checkpoints": "mine.pt"}, "checkpoints"),
    "a text for config": ({"config": "{}"}, "config"),
    "a class for sampling": ({"sampling": Sampling}, "sampling"),
    "a dictionary for sampling": ({"sampling": {"sampler": "flow"}}, "sampling"),
    "steps in words": ({"sampling": replace(SAMPLING, steps="many")}, "steps"),  # type: ignore[arg-type]
    "no steps": ({"sampling": replace(SAMPLING, steps=0)}, "sampling.steps"),
    "a scale of 0": ({"sampling": replace(SAMPLING, latent_scale=0.0)}, "latent_scale"),
    "guidance below 1": ({"guidance": replace(GUIDANCE, default_scale=0.5)}, "default_scale"),
    "a null label that is no function": ({"guidance": replace(GUIDANCE, null_label=10)}, "null_label"),  # type: ignore[arg-type]
    "a clock that stands": ({"guidance": replace(GUIDANCE, clock=(1.0, 1.0))}, "clock"),
    "a text for islands": ({"islands": Islands(modules="time")}, "modules"),  # type: ignore[arg-type]
    "a tuple for islands": ({"islands": ("time",)}, "islands"),
    "a gate in words": ({"gates": {"fp16": "3e-3"}}, "gates"),
    "an unknown gate": ({"gates": {"fp12": 3e-3}}, "fp12"),
    "no constructor": ({"constructor": None}, "constructor"),
    "no name at all": ({"name": 3}, "name"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_recipe_that_promises_what_there_is_not_is_refused(name: str, tmp_path: Path) -> None:
    changes, said = REFUSED[name]
    with pytest.raises((InputError, UsageError)) as caught:
        dexport.build(recipe(**changes), tmp_path / "out", parity=False)
    assert said in str(caught.value)
    assert "mine" in str(caught.value) or name == "no name at all"
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_the_command_names_recipe_and_port(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.exporter.test_ports import *\nRECIPE = recipe(network(two_channels))\n")
    result = CliRunner().invoke(main, ["build", str(file), "-o", str(tmp_path / "out")])
    assert result.exit_code == InputError.exit_code
    assert "error: mine: output out is declared as float32 ['B', 3, 8, 8]" in result.output


@pytest.mark.parametrize("name", list(all_recipes()))
def test_every_recipe_keeps_its_promises(name: str) -> None:
    chosen = all_recipes()[name]
    check_recipe(chosen)
    check_program(resolve(chosen))


SMALL = {"hidden_size": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("name", ["dit-fashion", "lit-fashion", "sd-vae-encoder"])
def test_small_networks_return_what_they_declare(name: str) -> None:
    narrow = {} if name.startswith("sd-vae") else SMALL
    check_network(resolved(name, settings=narrow))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_learned_variance_is_taken_where_the_sampler_knows_it(sampler: str) -> None:
    def both(self: Network, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.head(x, t, y), x], dim=1)

    signed = with_ports(out=TensorSpec("out", "float32", (BATCH, 6, 8, 8)))
    chosen = recipe(network(both), signature=signed, sampling=replace(SAMPLING, sampler=sampler))
    check_network(resolved(chosen))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, True),
        (True, int, False),
        (np.int64(3), int, True),
        (3, float, True),
        ("3", float, False),
        (None, int | None, True),
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ([1, 2], tuple[int, int], False),
        (("a",), tuple[str, ...], True),
        ("a", tuple[str, ...], False),
        ({"a": 1.0}, Mapping[str, float], True),
        ({1: 1.0}, Mapping[str, float], False),
        (len, Callable[[Any], int], True),
        (3, Callable[[Any], int], False),
        ({}, Any, True),
        (Recipe, Recipe, False),
    ],
)
def test_values_are_held_to_annotations(value: object, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
