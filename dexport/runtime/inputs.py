"""What every session checks of its inputs, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dexport import contract
from dexport.errors import UsageError

TYPE_NAMES = {"float32": "float", "float64": "double"}
"""ONNX's names of the dtypes that numpy calls otherwise."""
NUMPY_TYPES = {
    f"tensor({TYPE_NAMES.get(name, name)})": np.dtype(name)
    for name in ("float32", "float16", "float64", "int64", "int32", "bool")
}
"""Dtypes by ONNX's names of their tensors."""
TIME_TOLERANCE = 1e-6
"""Of a time that is one of a table's: another order of operations rounds it otherwise."""
SHOWN = 5


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
class Accepted:
    """The values of an input by which a graph indexes a table: any other is another row, without a message.

    Runtimes differ in what they do then: a negative label counts from the end of the table in ONNX Runtime and reads
    foreign memory in an engine. Other inputs take any value: what is not finite shows in the outputs.

    Attributes:
        low, high: ends of a range of integers, both included.
        choices: times of a table, of which a graph takes the nearest; empty where it is a range.
    """

    low: float
    high: float
    choices: tuple[float, ...] = ()

    @property
    def example(self) -> float:
        """One of the values."""
        return self.choices[0] if self.choices else self.low

    def refused(self, array: np.ndarray) -> np.ndarray:
        """The values that are none."""
        values = array.reshape(-1)
        if not self.choices:
            return values[~((values >= self.low) & (values <= self.high))]
        table = np.asarray(self.choices, np.float32)
        nearest = table[np.abs(values[:, None] - table).argmin(axis=1)]
        return values[~np.isclose(values, nearest, rtol=TIME_TOLERANCE, atol=TIME_TOLERANCE)]

    def __str__(self) -> str:
        if not self.choices:
            return f"{self.low} to {self.high}"
        return f"{len(self.choices)} times from {min(self.choices):g} to {max(self.choices):g}"


@dataclass(frozen=True)
class NamedPort:
    """A :class:`Port` for runtimes that bring none of their own."""

    name: str
    shape: Sequence[int | str | None]
    type: str
    accepted: Accepted | None = field(default=None, compare=False)


def port_of(port: contract.Port) -> NamedPort:
    """A port of a manifest as a session describes it."""
    return NamedPort(port.name, port.shape, type_of(port.dtype), accepted_of([port]).get(port.name))


def accepted_of(ports: Sequence[contract.Port]) -> dict[str, Accepted]:
    """What a manifest says of the values of inputs, by name: of those that index a table."""
    found = {}
    for port in ports:
        if port.range is not None:
            found[port.name] = Accepted(*port.range)
        elif port.choices:
            found[port.name] = Accepted(min(port.choices), max(port.choices), port.choices)
    return found


def type_of(dtype: str) -> str:
    """ONNX's name of the tensors of a numpy dtype."""
    return f"tensor({TYPE_NAMES.get(dtype, dtype)})"


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values as arrays in this machine's byte order, which is the only one that runtimes read right."""
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}


def check_inputs(
    ports: Mapping[str, Port], inputs: Mapping[str, np.ndarray], accepted: Mapping[str, Accepted] | None = None
) -> None:
    """Compare arrays with what a session takes.

    Args:
        accepted: the values of inputs that index a table; see :func:`accepted_of`.

    Raises:
        UsageError: missing, unknown or wrongly typed or shaped inputs, one symbolic size with two values, or values out
            of range.
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
    for name, values in (accepted or {}).items():
        wrong = values.refused(inputs[name]) if name in inputs else ()
        if len(wrong):
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise UsageError(
                f"input {name} has {', '.join(map(str, wrong[:SHOWN]))}{more}, which is out of range",
                hint=f"this model takes {values}",
            )


def _fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    return len(shape) == len(expected) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, expected, strict=True)
    )
