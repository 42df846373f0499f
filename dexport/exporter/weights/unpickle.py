"""A machine for pickles that can build dictionaries, lists and views of storages, and can call nothing.

What a pickle names is looked up by the caller, who gives a constant or a :class:`Maker`; nothing is imported, and no
method of anything that a pickle describes is called. What is no weight becomes :class:`Opaque`. Work and memory are
bounded by ``LARGEST_PICKLE`` and ``MOST_STEPS``.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

LARGEST_PICKLE = 32 << 20
"""Bytes. The index of a training checkpoint with three thousand tensors takes half a megabyte."""
MOST_STEPS = 3_000_000
KEYS = (str, bytes, int, float, type(None))
"""Hashing anything deeper would recurse as deep as the file likes."""
MARK = object()


class ForbiddenError(Exception):
    """A pickle names something that would have to run."""


@dataclass(frozen=True, eq=False)
class Opaque:
    """Something that is no weight, or a tensor that cannot be read: ``kind`` says what."""

    kind: str
    is_tensor: bool = False


@dataclass(eq=False)
class Instance:
    """An object of a class that is not looked at, with the attributes that the pickle gives it."""

    of: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Maker:
    """What a pickle may call; it must neither allocate much nor do much."""

    make: Callable[..., Any]


class Machine:
    """Loads pickles one after another.

    Args:
        find: (module, name) -> constant or :class:`Maker`; raises :class:`ForbiddenError`.
        storage: persistent id -> storage.
    """

    def __init__(self, find: Callable[[str, str], Any], storage: Callable[[Any], Any]) -> None:
        self._find = find
        self._storage = storage
        self._steps = 0

    def load(self, file: IO[bytes]) -> Any:
        """The object of the next pickle; the file stands behind it afterwards.

        Raises:
            ForbiddenError: it names what the caller does not know.
            Exception: any at all, for a damaged one.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._spend(1)
            if opcode.name in CONSTANTS:
                self._stack.append(argument)
            elif opcode.name == "STOP":
                return self._stack.pop()
            else:
                step = STEPS.get(opcode.name)
                if step is None:
                    raise ValueError(f"the operation {opcode.name} is not one of a checkpoint's")
                step(self, argument)
        raise EOFError("it has no end")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise ValueError("its index is larger than any checkpoint's")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not MARK:
            at -= 1
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return items

    def _drop(self, count: int) -> None:
        self._last(count)

    def _drop_to_mark(self) -> None:
        self._to_mark()

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise ValueError("items are set on what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) in KEYS or type(key) is bool else Opaque("key")] = value

    def _new_dict(self) -> None:
        items = self._to_mark()
        self._push({})
        self._set(items)

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("items are appended to what is no list")
        self._stack[-1].extend(items)

    def _call(self, *arguments: Any) -> None:
        maker = self._stack.pop()
        if not isinstance(maker, Maker):
            raise ValueError("it calls what cannot be called")
        self._push(maker.make(*arguments))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        if type(arguments) is not tuple:
            raise ValueError("the arguments of a call are no tuple")
        self._call(*arguments)

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Instance) and type(state) is dict:
            self._spend(len(state))
            target.attributes.update(state)

    def _global(self, module: str, name: str) -> None:
        self._push(self._find("builtins" if module == "__builtin__" else module, name))

    def _stack_global(self) -> None:
        module, name = self._last(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        self._global(module, name)

    def _memoize(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _new_with_keywords(self) -> None:
        arguments, _keywords = self._last(2)
        self._push(arguments)
        self._reduce()


CONSTANTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    )
)
"""Operations whose argument is the value."""
STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda *_: None,
    "FRAME": lambda *_: None,
    "NONE": lambda m, _: m._push(None),
    "NEWTRUE": lambda m, _: m._push(True),
    "NEWFALSE": lambda m, _: m._push(False),
    "MARK": lambda m, _: m._push(MARK),
    "POP": lambda m, _: m._drop(1),
    "POP_MARK": lambda m, _: m._drop_to_mark(),
    "EMPTY_TUPLE": lambda m, _: m._push(()),
    "EMPTY_LIST": lambda m, _: m._push([]),
    "EMPTY_DICT": lambda m, _: m._push({}),
    "EMPTY_SET": lambda m, _: m._push([]),
    "ADDITEMS": lambda m, _: m._extend(m._to_mark()),
    "FROZENSET": lambda m, _: m._push(m._to_mark()),
    "TUPLE": lambda m, _: m._push(tuple(m._to_mark())),
    "TUPLE1": lambda m, _: m._push(tuple(m._last(1))),
    "TUPLE2": lambda m, _: m._push(tuple(m._last(2))),
    "TUPLE3": lambda m, _: m._push(tuple(m._last(3))),
    "LIST": lambda m, _: m._push(m._to_mark()),
    "APPEND": lambda m, _: m._extend(m._last(1)),
    "APPENDS": lambda m, _: m._extend(m._to_mark()),
    "DICT": lambda m, _: m._new_dict(),
    "SETITEM": lambda m, _: m._set(m._last(2)),
    "SETITEMS": lambda m, _: m._set(m._to_mark()),
    "GLOBAL": lambda m, argument: m._global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m._stack_global(),
    "REDUCE": lambda m, _: m._reduce(),
    "NEWOBJ": lambda m, _: m._reduce(),
    "NEWOBJ_EX": lambda m, _: m._new_with_keywords(),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._push(m._storage(m._last(1)[0])),
    "GET": lambda m, index: m._push(m._memo[index]),
    "BINGET": lambda m, index: m._push(m._memo[index]),
    "LONG_BINGET": lambda m, index: m._push(m._memo[index]),
    "PUT": lambda m, index: m._memoize(index),
    "BINPUT": lambda m, index: m._memoize(index),
    "LONG_BINPUT": lambda m, index: m._memoize(index),
    "MEMOIZE": lambda m, _: m._memoize(None),
}
