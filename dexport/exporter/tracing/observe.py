"""What a block does in one call: the functions of torch that it calls, in order, and what it gives them.

Two calls that do the same are traced as the same graph, whatever decided what they do: attributes, containers, global
or random state. What is done is written down above torch's dispatcher, in terms that do not depend on the block: its
arguments by their place, its weights by their names in it, what it made by the order. Nothing else is equal to
anything.

Whether a call does what was written down is found without doing it: as long as every step is the same, its results are
known, and the block is handed stand-ins for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONSTANTS = (*PLAIN, torch.layout, torch.memory_format, EllipsisType)
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Irregular(Exception):  # noqa: N818 - not an error: the whole network is traced instead
    """This network's blocks cannot be traced once; the reason is the message."""


@dataclass(frozen=True)
class Label:
    """What a tensor is to the block: argument ``name``, weight ``name``, or a result of a step."""

    kind: str
    name: Any


class Unknown:
    """Results that cannot be given again."""


@dataclass
class Iterated:
    """What an iterator gives."""

    items: list[Any]


@dataclass
class Step:
    """A call of torch.

    Attributes:
        called: the function and what it is given.
        results: what it gives, with labels in place of tensors.
    """

    called: tuple[Any, ...]
    results: Any = field(default_factory=Unknown)


def _is_size(value: Any) -> bool:
    """A size stays one: pytree would make a tuple of it, which is something else to a block."""
    return isinstance(value, torch.Size)


class Names:
    """The tensors of one call by their labels, and back."""

    def __init__(self, arguments: Sequence[Tensor], weights: Mapping[str, Tensor]) -> None:
        self._labels: dict[int, Label] = {}
        self._tensors: dict[Label, Tensor] = {}  # keeps them alive: an id belongs to a living tensor
        for name, x in weights.items():
            self.give(x, Label("weight", name))
        for index, x in enumerate(arguments):
            self.give(x, Label("argument", index))

    def give(self, x: Tensor, label: Label) -> Label:
        self._tensors[label] = x
        return self._labels.setdefault(id(x), label)

    def tensor(self, label: Label) -> Tensor | None:
        return self._tensors.get(label)

    def describe(self, value: Any) -> Any:
        """Something that equals the description of another call's value where both are the same to the block."""
        if isinstance(value, Tensor):
            return self._labels.get(id(value)) or object()
        if isinstance(value, CONSTANTS):
            return (type(value), repr(value))
        if isinstance(value, SYMBOLS):
            return (type(value), str(value))
        if isinstance(value, slice):
            return (slice, self.describe((value.start, value.stop, value.step)))
        if isinstance(value, (list, tuple)):
            return (type(value), tuple(map(self.describe, value)))
        if isinstance(value, dict):
            return (type(value), tuple((self.describe(key), self.describe(item)) for key, item in value.items()))
        return object()


class Recording(TorchFunctionMode):
    """Writes down every step while it is entered."""

    def __init__(self, arguments: Sequence[Tensor], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = Names(arguments, weights)
        self.steps: list[Step] = []

    def __torch_function__(
        self, function: Callable[..., Any], _types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        step = Step(_called(self.names, function, args, kwargs))  # before the call, which may change what it is given
        self.steps.append(step)
        results = function(*args, **(kwargs or {}))
        is_iterator = isinstance(results, Iterator)
        if is_iterator:
            results = list(results)
        leaves, spec = pytree.tree_flatten(results, is_leaf=_is_size)
        labelled = [self._labelled(x, index) for index, x in enumerate(leaves)]
        if all(isinstance(x, (Label, torch.Size, *CONSTANTS, *SYMBOLS)) for x in labelled):
            given = pytree.tree_unflatten(labelled, spec)
            step.results = Iterated(given) if is_iterator else given
        return iter(results) if is_iterator else results

    def _labelled(self, value: Any, index: int) -> Any:
        return self.names.give(value, Label("step", (len(self.steps), index))) if isinstance(value, Tensor) else value


class StandIn(Tensor):
    """A tensor of which nothing is known; where it may be used, a :class:`Rehearsal` answers for it."""

    device = torch.device("cpu")  # a fake tensor answers this by itself, too

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, _args: Any = (), _kwargs: Any = None) -> Any:
        raise Irregular(f"a value of a block reaches {function} by another way than its results")


NOTHING = torch.empty(0, device="meta")


def _stand_in() -> Tensor:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return torch.Tensor._make_subclass(StandIn, NOTHING)


class Rehearsal(TorchFunctionMode):
    """Answers what a recording has for as long as every step is the same; nothing is computed.

    Attributes:
        arguments: stand-ins, to be given to the block.
    """

    def __init__(self, recording: Recording, arguments: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._recording = recording
        self._at = 0
        self.arguments = [_stand_in() for _ in range(arguments)]
        self.names = Names(self.arguments, weights)

    def __torch_function__(
        self, function: Callable[..., Any], _types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        steps = self._recording.steps
        if self._at == len(steps):
            raise Irregular(f"goes on with {function}")
        step = steps[self._at]
        if step.called != _called(self.names, function, args, kwargs):
            raise Irregular(f"calls {function} otherwise, as its step {self._at}")
        if isinstance(step.results, Unknown):
            raise Irregular(f"calls {function}, whose results are of an unknown kind")
        self._at += 1
        if isinstance(step.results, Iterated):
            return iter([self._answer(item) for item in step.results.items])
        return pytree.tree_map(self._answer, step.results, is_leaf=_is_size)

    def finished(self, returned: Any, as_recorded: Any) -> bool:
        """Whether all was done, and the same is returned."""
        return self._at == len(self._recording.steps) and self.names.describe(
            returned
        ) == self._recording.names.describe(as_recorded)

    def _answer(self, value: Any) -> Any:
        if not isinstance(value, Label):
            return value
        known = self.names.tensor(value)
        if known is None:
            known = _stand_in()
            self.names.give(known, value)
        return known


def _called(names: Names, function: Any, args: Any, kwargs: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """A call, with all around it that decides what torch makes of it."""
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    around = (torch.is_grad_enabled(), torch.get_default_dtype(), autocast)
    return (function, names.describe(args), names.describe(kwargs or {}), around)
