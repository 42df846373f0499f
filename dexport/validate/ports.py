"""Which input and output of an ONNX file is which of the network that it is said to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from dexport.errors import InputError
from dexport.runtime.session import OnnxSession

NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class Named(Protocol):
    """An input or output; a dimension that is no number is not fixed."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Sequence[int | str | None]: ...


def match_ports(
    model: str, session: OnnxSession, owner: str, inputs: Sequence[Named], outputs: Sequence[Named]
) -> dict[str, str]:
    """The name of every wanted input and output -> the file's. They are matched by name, or else by their order.

    Args:
        model, owner: what ``session`` runs, and what ``inputs`` and ``outputs`` are of, for messages.

    Raises:
        InputError: another number of them, or inputs of other shapes, or of types that numpy does not have.
    """
    names: dict[str, str] = {}
    for kind, wanted, found in (
        ("inputs", [port.name for port in inputs], list(session.inputs)),
        ("outputs", [port.name for port in outputs], session.outputs),
    ):
        if len(found) != len(wanted):
            raise InputError(
                f"{model} has the {kind} {', '.join(found)}; {owner} has {', '.join(wanted)}",
                hint="choose one that fits: `dexport info` shows the inputs of a recipe or a bundle",
            )
        names.update(zip(wanted, wanted if set(found) == set(wanted) else found, strict=True))
    for wanted_port in inputs:
        port = session.inputs[names[wanted_port.name]]
        if not _fits(port.shape, wanted_port.shape) or port.type not in NUMPY_TYPES:
            raise InputError(
                f"{model}: {names[wanted_port.name]} is {port.type} {list(port.shape)}, where {owner} takes "
                f"{wanted_port.name} of shape {list(wanted_port.shape)}",
                hint="inputs are matched by name, or else by their order",
            )
    return names


def as_taken(inputs: Mapping[str, np.ndarray], names: Mapping[str, str], session: OnnxSession) -> dict[str, np.ndarray]:
    """Inputs under the names and in the types of the file."""
    return {names[name]: array.astype(NUMPY_TYPES[session.inputs[names[name]].type]) for name, array in inputs.items()}


def _fits(shape: Sequence[int | str | None], wanted: Sequence[int | str | None]) -> bool:
    sizes = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and not any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
