"""Which port of a file is which of the network: matched whole, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dexport.errors import InputError, UsageError
from dexport.runtime.inputs import NamedPort
from dexport.validate.onnx_file.match_ports import Matched, as_seen, as_taken, match_ports

F32, F16, F64 = "tensor(float)", "tensor(float16)", "tensor(double)"
I64, I32 = "tensor(int64)", "tensor(int32)"
IMAGE = (None, 4, 8, 8)
INPUTS = (NamedPort("x", ("B", 4, 8, 8), F32), NamedPort("t", ("B",), F32), NamedPort("y", ("B",), I64))
OUTPUTS = (NamedPort("out", ("B", 4, 8, 8), F32),)
TWINS = (NamedPort("t", ("B",), F32), NamedPort("scale", ("B",), F32))


def session(inputs: Sequence[tuple[str, Any, str]], outputs: Sequence[tuple[str, Any, str]] | None = None) -> Any:
    outputs = [("out", IMAGE, F32)] if outputs is None else outputs
    ports = [{name: SimpleNamespace(shape=s, type=t) for name, s, t in kind} for kind in (inputs, outputs)]
    return SimpleNamespace(inputs=ports[0], output_ports=ports[1], outputs=list(ports[1]))


def file(x: Any = ("x", IMAGE, F32), t: Any = ("t", ("N",), F32), y: Any = ("y", ("N",), I64), **kinds: Any) -> Any:
    return session([port for port in (x, t, y) if port], kinds.get("outputs"))


def match(found: Any, mapping: dict[str, str] | None = None) -> Matched:
    return match_ports("m.onnx", found, "the recipe", INPUTS, OUTPUTS, mapping)


SAME = {"x": "x", "t": "t", "y": "y", "out": "out"}


def test_equal_names_in_any_order() -> None:
    assert match(file()) == Matched(SAME, None, ())
    mixed = session([("y", ("N",), I64), ("x", IMAGE, F32), ("t", ("N",), F32)])
    assert match(mixed).names == SAME


def test_other_names_are_matched_by_order_where_types_leave_no_other_and_that_is_told() -> None:
    found = match(file(("sample", IMAGE, F32), ("timestep", ("N",), F32), ("class_labels", ("N",), I64)))
    assert found.names == {"x": "sample", "t": "timestep", "y": "class_labels", "out": "out"}
    assert found.notes == ("inputs are matched by their order: x is sample, t is timestep, y is class_labels",)


def test_a_mapping_gives_names() -> None:
    renamed = file(("sample", IMAGE, F32), outputs=[("noise", IMAGE, F32)])
    assert match(renamed, {"x": "sample", "out": "noise"}) == Matched({**SAME, "x": "sample", "out": "noise"}, None, ())
    swapped = file(("t", IMAGE, F32), ("x", ("N",), F32))
    with pytest.raises(InputError, match=r"x is tensor\(float\) \['N'\]"):
        match(swapped)
    assert match(swapped, {"x": "t", "t": "x"}).names == {**SAME, "x": "t", "t": "x"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (file(("sample", IMAGE, F32)), "x has no counterpart; the file has sample"),
        (file(t=("T", ("N",), F32), y=("labels", ("N",), I64)), "t, y has no counterpart"),
        (file(y=None), "has the inputs x, t; the recipe has x, t, y"),
        (session([("x", IMAGE, F32), ("t", ("N",), F32), ("y", ("N",), I64), ("mask", (1,), F32)]), "x, t, y, mask"),
        (file(outputs=[("out", IMAGE, F32), ("logvar", IMAGE, F32)]), "has the outputs out, logvar"),
        (file(outputs=[]), "has the outputs none"),
        (file(t=("t", ("N",), I64)), r"t is tensor\(int64\)"),
        (file(y=("y", ("N",), F32)), r"y is tensor\(float\)"),
        (file(y=("y", ("N",), "tensor(string)")), r"tensor\(string\)"),
        (file(("x", IMAGE, "tensor(bfloat16)")), r"tensor\(bfloat16\)"),
        (file(("x", None, "seq(tensor(float))")), r"x is seq\(tensor\(float\)\) \[\]"),
        (file(outputs=[("out", IMAGE, I64)]), r"out is tensor\(int64\)"),
        (file(t=("t", ("N", 1), F32)), r"t is tensor\(float\) \['N', 1\]"),
        (file(t=("t", (), F32)), r"t is tensor\(float\) \[\]"),
        (file(("x", (None, 3, 8, 8), F32)), r"\[None, 3, 8, 8\]"),
        (file(outputs=[("out", (None, 8, 8, 8), F32)]), r"out is tensor\(float\) \[None, 8, 8, 8\]"),
        (file(t=("t", (1,), F32), y=("y", (2,), I64)), "different fixed batches: 1, 2"),
        (file(("x", (2, 4, 8, 8), F32), outputs=[("out", (1, 4, 8, 8), F32)]), "different fixed batches: 1, 2"),
        (file(t=("t", (0,), F32)), "a fixed batch of 0"),
        (file(t=("t", (10**9,), F32)), "a fixed batch of 1000000000"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(found: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        match(found)
    assert caught.value.hint and "\n" not in str(caught.value)


def test_what_types_cannot_tell_apart_needs_a_mapping() -> None:
    twins = session([("a", ("N",), F32), ("b", ("N",), F32)])
    with pytest.raises(InputError, match="t and scale cannot be told apart") as caught:
        match_ports("m.onnx", twins, "the recipe", TWINS, OUTPUTS)
    assert "--port" in caught.value.hint
    found = match_ports("m.onnx", twins, "the recipe", TWINS, OUTPUTS, {"t": "b", "scale": "a"})
    assert (found.names["t"], found.names["scale"]) == ("b", "a")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"z": "x"}, "the network has no z"),
        ({"x": "sample"}, "the file has no sample"),
        ({"x": "x", "t": "x"}, "one port of the file to two"),
    ],
)
def test_a_mapping_that_means_nothing_is_a_usage_error(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        match(file(), mapping)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_fixed_batch_is_kept_wherever_it_is(batch: int) -> None:
    assert match(file(t=("t", (batch,), F32))).batch == batch
    assert match(file(outputs=[("out", (batch, 4, 8, 8), F32)])).batch == batch


@pytest.mark.parametrize(("floats", "integers"), [(F16, I64), (F64, I32), (F32, I32), (F16, I32)])
def test_casts_are_told_and_pytorch_gets_the_same_values(floats: str, integers: str) -> None:
    found = file(("x", IMAGE, floats), ("t", ("N",), F32), ("y", ("N",), integers))
    matched = match(found)
    assert len(matched.notes) == (floats != F32) + (integers != I64)
    inputs = {"x": np.full((1, 4, 8, 8), 0.1, np.float32), "t": np.float32([666.33]), "y": np.int64([7])}
    taken, seen = as_taken(inputs, matched.names, found), as_seen(inputs, matched.names, found)
    for name, array in inputs.items():
        assert seen[name].dtype == array.dtype
        np.testing.assert_array_equal(taken[name].astype(np.float64), seen[name].astype(np.float64))
