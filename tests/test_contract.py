"""The types of a manifest: what a reader takes, and what it refuses by name before anything is allocated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dexport.contract import Condition, Decoding, Graph, GuidanceRule, Port, from_json, graphs_from_json, to_json
from dexport.errors import InputError

PORT = {"name": "x", "dtype": "float32", "shape": ["B", 4, 16, 16], "role": "state"}


def graph(**changes: Any) -> dict[str, Any]:
    port = {**PORT, **changes}
    return {"model": {"inputs": [port], "outputs": [port]}}


@pytest.mark.parametrize(
    "value",
    [
        Port("x", "float32", ("B", 4, 16, 16), "state"),
        Port("y", "int64", ("B",), "label", range=(0, 10)),
        Graph((Port("t", "float32", ("B",), "time", choices=(1.0, 2.0)),), (Port("out", "float32", ("B", 4)),)),
        Condition("class", 10, ("a", "b"), 10),
        GuidanceRule(4, 1.5),
        Decoding("pixel-shuffle", factor=2, tiles=4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_come_back_from_json(value: Any) -> None:
    assert from_json(type(value), json.loads(json.dumps(to_json(value))), "x") == value


def test_more_that_a_manifest_says_of_a_graph_is_left_out() -> None:
    entry = graph()
    entry["model"]["nodes"] = {"a": "float32"}
    assert graphs_from_json(entry, "x")["model"].inputs == (Port("x", "float32", ("B", 4, 16, 16), "state"),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [4, "B"]}, "only the first dimension may be the batch"),
        ({"shape": ["N", 4]}, "shape"),
        ({"shape": [-1, 4]}, "shape"),
        ({"shape": [10**12]}, "shape"),
        ({"shape": [1] * 100}, "shape"),
        ({"dtype": "float31"}, "dtype"),
        ({"dtype": "x" * 500}, "dtype"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"name": ""}, "name"),
        ({"range": [0, float("inf")]}, "range"),
        ({"choices": [float("nan")]}, "choices"),
    ],
)
def test_what_is_no_port_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=r"manifest\.json is not what dexport writes there") as refused:
        graphs_from_json(graph(**changes), "manifest.json")
    assert words in str(refused.value)
    assert len(str(refused.value)) < 800


def test_a_graph_has_inputs_and_outputs() -> None:
    for side in ("inputs", "outputs"):
        entry = graph()
        entry["model"][side] = []
        with pytest.raises(InputError, match=side):
            graphs_from_json(entry, "x")
