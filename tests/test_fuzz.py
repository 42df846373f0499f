"""A few of the inputs of ``python3 -m tools.fuzz``; a whole run has 10,000 per reader."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dexport.errors import InputError
from tools.fuzz import READERS, reader, try_one
from tools.mutate import changed, damaged

COUNTS = {
    "manifest": 150,
    "archive": 200,
    "signature": 300,
    "safetensors": 200,
    "torch": 100,
    "report": 40,
    "baseline": 60,
    "record": 60,
    "precision map": 300,
    "picture": 100,
    "npz": 20,
    "run.json": 100,
    "onnx": 200,
    "onnx bundle": 40,
}
SWALLOW = ("picture", "npz", "run.json")
"""Readers that take a refusal for an answer."""


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_or_take_whatever_comes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.fuzz_graphs.RUN_SHARE", 0.0)  # takes seconds each
    with reader(name) as read:
        taken = [try_one(read, f"{name}-test-{number}") for number in range(COUNTS[name])]
    assert name in SWALLOW or False in taken


def test_inputs_are_the_same_for_the_same_seed() -> None:
    content = bytes(range(100))
    assert damaged(random.Random("a"), content) == damaged(random.Random("a"), content)
    assert damaged(random.Random("a"), content) != damaged(random.Random("b"), content)
    facts = {"a": [1, {"b": 2}], "c": "d"}
    assert changed(random.Random("a"), facts) == changed(random.Random("a"), facts)
    assert facts == {"a": [1, {"b": 2}], "c": "d"}


def test_anything_else_than_a_refusal_is_a_finding() -> None:
    def broken(_rng: random.Random) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        try_one(broken, "")


def test_every_message_can_be_printed() -> None:
    assert str(InputError("a\ud800é")) == "a\\ud800é"


def test_good_files_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing behind the first check would be tried."""
    for module in ("fuzz", "fuzz_documents", "fuzz_graphs"):
        for name in ("damaged", "changed", "changed_graph", "rezipped"):
            monkeypatch.setattr(f"tools.{module}.{name}", lambda _rng, good, *_: good, raising=False)
    monkeypatch.setattr("tools.fuzz_graphs.RUN_SHARE", 0.0)
    for name in READERS:
        with reader(name) as read:
            # The torch reader's last file is no state dict.
            assert sum(try_one(read, str(number)) for number in range(20)) >= 10, name
    assert not list(tmp_path.iterdir())
