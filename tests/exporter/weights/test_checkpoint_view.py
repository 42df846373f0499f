"""Views of a checkpoint: names, shapes and values as a model wants them, nothing read before it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.exporter.weights.checkpoint_view import Entry, View, renamed, stored
from dexport.exporter.weights.source import Origin, WeightSource


class Counting(WeightSource):
    """A source in memory that records what was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.origin = Origin("torch", "w.pt", container="ema")
        self.reads: list[str] = []

    def _read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


def test_a_view_renames_reshapes_and_computes_when_it_is_read() -> None:
    base = Counting({"a": torch.arange(4.0), "b": torch.tensor([2.0]), "unused": torch.ones(1)})
    view = View(
        base,
        {
            "same": stored(base, "a"),
            "square": stored(base, "a", (2, 2)),
            "product": Entry((4,), lambda: base.tensors["a"] * base.read("b", torch.float32)),
        },
        "packed",
    )
    assert view.shapes == {"same": (4,), "square": (2, 2), "product": (4,)}
    assert base.reads == []
    assert view.read("square", torch.float32).tolist() == [[0, 1], [2, 3]]
    assert view.read("product", torch.float16).tolist() == [0, 2, 4, 6]
    assert base.reads == ["a", "b"]
    assert view.read("same", torch.float32).tolist() == [0, 1, 2, 3]


def test_the_origin_is_the_file_s_with_the_layout() -> None:
    base = Counting({})
    view = View(base, {}, "packed")
    assert (view.origin.path, view.origin.container, view.origin.layout) == ("w.pt", "ema", "packed")
    assert str(view.origin) == "w.pt [ema] (packed layout)"
    assert str(base.origin) == "w.pt [ema]"


def test_names_without_a_place_keep_their_own() -> None:
    names = renamed(["a", "b", "c"], str.upper, {"A", "B"})
    assert names == {"A": "a", "B": "b", "c": "c"}


def test_of_two_names_for_one_place_the_present_one_wins_and_the_other_stays() -> None:
    for stored_names in (["old", "new"], ["new", "old"]):
        names = renamed(stored_names, lambda name: name.replace("old", "new"), {"new"})
        assert names == {"new": "new", "old": "old"}
