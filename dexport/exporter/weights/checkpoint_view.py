"""A checkpoint seen as the state dict that a model expects: other names, other shapes, values computed on reading."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dexport.exporter.weights.source import WeightSource


@dataclass(frozen=True)
class Entry:
    """One tensor of a view: its shape, and how to get its values, which reads as many stored tensors as it needs."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class View(WeightSource):
    """Entries over a base source. Nothing is read before it is asked for, and nothing is kept.

    Args:
        base: where the entries read from; its origin, with ``layout`` added, is the view's.
        entries: name in the model -> entry.
        layout: what to call the way in which the base stores these weights.
    """

    def __init__(self, base: WeightSource, entries: Mapping[str, Entry], layout: str) -> None:
        self._base = base
        self._entries = entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.origin = base.origin if base.origin.random else replace(base.origin, layout=layout)

    def _read(self, name: str) -> Tensor:
        return self._entries[name].read()

    def check_unchanged(self) -> None:
        self._base.check_unchanged()


def stored(base: WeightSource, name: str, shape: tuple[int, ...] | None = None) -> Entry:
    """A tensor of the base as it is, or with its values in another ``shape``."""
    shape = base.shapes[name] if shape is None else shape
    return Entry(shape, lambda: base._read(name).reshape(shape))


def renamed(names: Iterable[str], rename: Callable[[str], str], expected: Container[str]) -> dict[str, str]:
    """Name in the model -> stored name.

    A tensor for which the model has no place, or whose place another one has taken, keeps its stored name, under which
    it is then reported as unexpected.
    """
    result: dict[str, str] = {}
    for name in sorted(names, key=lambda name: rename(name) != name):
        new = rename(name)
        result[new if new in expected and new not in result else name] = name
    return result


def without(base: WeightSource, others: Container[str], layout: str) -> View:
    """What is left of a file when the tensors of ``others``, by the first part of their name, are another network's."""
    own = [name for name in base.shapes if name.partition(".")[0] not in others]
    return View(base, {name: stored(base, name) for name in own}, layout)
