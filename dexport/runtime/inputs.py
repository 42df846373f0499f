"""What every session checks of its inputs, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dexport.errors import UsageError

TYPE_NAMES = {"float32": "float", "float64": "double"}
"""ONNX's names of the dtypes that numpy calls otherwise."""


class Port(Protocol):
    """An input as a session describes it.

    Attributes:
        shape: an integer where the size is fixed; a name, or None, where it is not.
        type: such as ``tensor(float)``.
    """

    @property
    def shape(self) -> Sequence[int | str | None]: ...

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class NamedPort:
    """A :class:`Port` for runtimes that bring none of their own."""

    name: str
    shape: Sequence[int | str | None]
    type: str


def port_of(spec: Mapping[str, Any]) -> NamedPort:
    """The port of an entry of a manifest's ``io`` section."""
    return NamedPort(spec["name"], tuple(spec["shape"]), type_of(spec["dtype"]))


def type_of(dtype: str) -> str:
    """ONNX's name of the tensors of a numpy dtype."""
    return f"tensor({TYPE_NAMES.get(dtype, dtype)})"


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values as arrays in this machine's byte order, which is the only one that runtimes read right."""
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}


def check_inputs(ports: Mapping[str, Port], inputs: Mapping[str, np.ndarray]) -> None:
    """Compare arrays with what a session takes.

    Raises:
        UsageError: missing, unknown or wrongly typed or shaped inputs, or one symbolic size with two values.
    """
    if set(inputs) != set(ports):
        raise UsageError(f"this model takes {', '.join(ports)}; got {', '.join(inputs) or 'nothing'}")
    sizes: dict[str, int] = {}
    for name, port in ports.items():
        array = inputs[name]
        if not _fits(array.shape, port.shape):
            raise UsageError(f"input {name} has shape {list(array.shape)}, expected {list(port.shape)}")
        if port.type != type_of(array.dtype.name):
            raise UsageError(f"input {name} has dtype {array.dtype.name}, expected {port.type}")
        for size, dim in zip(array.shape, port.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise UsageError(f"input {name} has {dim} = {size}, but an input before it has {sizes[dim]}")


def _fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    return len(shape) == len(expected) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, expected, strict=True)
    )
