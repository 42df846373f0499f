"""Which input and output of an ONNX file is which of the network that it is said to be.

Nothing is guessed where a guess could be wrong, and nothing is left over: every port of the file has its counterpart,
or the file is refused with what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dexport.errors import InputError, UsageError
from dexport.runtime.inputs import NUMPY_TYPES, NamedPort, Port
from dexport.runtime.session import OnnxSession

LARGEST_BATCH = 1024
"""Of a file whose batch is fixed: inputs of so many rows are made for it."""
MAPPING = "say which is which: --port NAME=THE_FILES_NAME, for every one whose name differs"


@dataclass(frozen=True)
class Matched:
    """The ports of a file, by the network's names.

    Attributes:
        names: network's name -> the file's, of every input and output.
        batch: the batch that the file fixes; None where it is free.
        notes: what a reader has to know: names that were matched by their place, and types that are cast.
    """

    names: Mapping[str, str]
    batch: int | None
    notes: tuple[str, ...]


def match_ports(
    model: str,
    session: OnnxSession,
    owner: str,
    inputs: Sequence[NamedPort],
    outputs: Sequence[NamedPort],
    mapping: Mapping[str, str] | None = None,
) -> Matched:
    """Find the counterpart of every wanted input and output.

    They are matched by the mapping that is given, else by equal names. Where no name is equal, they are matched by
    their order, if their types and shapes leave no other; that is noted.

    Args:
        model, owner: what ``session`` runs, and what ``inputs`` and ``outputs`` are of, for messages.
        mapping: network's name -> the file's; names that are equal may be left out.

    Raises:
        UsageError: a mapping of names that do not exist.
        InputError: ports that are missing or left over, names of which only some are equal, other types, ranks or
            sizes, or several fixed batches.
    """
    mapping = mapping or {}
    _check_mapping(mapping, [*inputs, *outputs], [*session.inputs, *session.outputs])
    names: dict[str, str] = {}
    notes: list[str] = []
    batches: set[int] = set()
    for kind, wanted, found in (
        ("inputs", inputs, session.inputs),
        ("outputs", outputs, session.output_ports),
    ):
        pairs = _pairs(model, owner, kind, [port.name for port in wanted], list(found), mapping)
        guessed = not set(pairs.values()) & {*pairs, *mapping.values()}
        for port in wanted:
            batches |= set(_check(model, owner, port, pairs[port.name], found[pairs[port.name]]))
            notes += _cast(port, pairs[port.name], found[pairs[port.name]])
        if guessed and pairs:
            _check_unambiguous(model, kind, wanted)
            notes.append(f"{kind} are matched by their order: {_listed(pairs)}")
        names |= pairs
    if len(batches) > 1:
        raise InputError(
            f"{model} has ports of different fixed batches: {', '.join(map(str, sorted(batches)))}",
            hint="export it with one batch, or with a free one",
        )
    batch = next(iter(batches), None)
    if batch is not None and not 1 <= batch <= LARGEST_BATCH:
        raise InputError(
            f"{model} has a fixed batch of {batch}, expected 1 to {LARGEST_BATCH}", hint="export it with a free batch"
        )
    return Matched(names, batch, tuple(notes))


def as_taken(inputs: Mapping[str, np.ndarray], names: Mapping[str, str], session: OnnxSession) -> dict[str, np.ndarray]:
    """Inputs under the names and in the types of the file."""
    return {names[name]: array.astype(NUMPY_TYPES[session.inputs[names[name]].type]) for name, array in inputs.items()}


def as_seen(inputs: Mapping[str, np.ndarray], names: Mapping[str, str], session: OnnxSession) -> dict[str, np.ndarray]:
    """Inputs with the values that the file gets: rounded to its types, in the network's."""
    taken = as_taken(inputs, names, session)
    return {name: taken[names[name]].astype(array.dtype) for name, array in inputs.items()}


def _check_mapping(mapping: Mapping[str, str], wanted: Iterable[NamedPort], found: Sequence[str]) -> None:
    known = [port.name for port in wanted]
    for name, there in mapping.items():
        if name not in known:
            raise UsageError(f"--port {name}={there}: the network has no {name}", hint=f"it has {', '.join(known)}")
        if there not in found:
            raise UsageError(f"--port {name}={there}: the file has no {there}", hint=f"it has {', '.join(found)}")
    if len(set(mapping.values())) < len(mapping):
        raise UsageError("--port gives one port of the file to two of the network", hint="give each its own")


def _pairs(
    model: str, owner: str, kind: str, wanted: Sequence[str], found: Sequence[str], mapping: Mapping[str, str]
) -> dict[str, str]:
    """Network's name -> the file's; all of both."""
    pairs = {name: mapping.get(name, name) for name in wanted}
    missing = [name for name, there in pairs.items() if there not in found]
    left = [name for name in found if name not in pairs.values()]
    if not missing and not left:
        return pairs
    if len(found) != len(wanted):
        raise InputError(
            f"{model} has the {kind} {', '.join(found) or 'none'}; {owner} has {', '.join(wanted) or 'none'}",
            hint="choose one that fits: `dexport info` shows the inputs of a recipe or a bundle",
        )
    if len(missing) < len(wanted):
        raise InputError(
            f"{model}: of the {kind} of {owner}, {', '.join(missing)} has no counterpart; the file has "
            f"{', '.join(left)} that nothing is known of",
            hint=MAPPING,
        )
    return dict(zip(wanted, found, strict=True))


def _check_unambiguous(model: str, kind: str, wanted: Sequence[NamedPort]) -> None:
    """Refuse to match by order what could be matched otherwise as well."""
    seen: dict[tuple[str, int], str] = {}
    for port in wanted:
        other = seen.setdefault((port.type, len(port.shape)), port.name)
        if other != port.name:
            raise InputError(
                f"{model}: none of its {kind} has a name of the network's, and {other} and {port.name} cannot be told "
                "apart by type and shape",
                hint=MAPPING,
            )


def _check(model: str, owner: str, wanted: NamedPort, name: str, port: Port) -> Iterator[int]:
    """Hold a port of the file to its counterpart; yields the batch, where it is fixed."""
    shape = list(port.shape or ())
    if port.type not in NUMPY_TYPES or not _fits(shape, wanted.shape) or not _castable(wanted.type, port.type):
        raise InputError(
            f"{model}: {name} is {port.type} {shape}, where {owner} has {wanted.name}, {wanted.type} of shape "
            f"{list(wanted.shape)}",
            hint="export it with the same types and sizes; floats may be float16 or double, integers int32",
        )
    yield from (a for a, b in zip(shape, wanted.shape, strict=True) if isinstance(a, int) and not isinstance(b, int))


def _cast(wanted: NamedPort, name: str, port: Port) -> Iterator[str]:
    if port.type != wanted.type:
        yield f"{name} is {port.type}, where {wanted.name} is {wanted.type}: values are cast, for PyTorch as well"


def _castable(wanted: str, given: str) -> bool:
    """Floats to floats and integers to integers: a time or a label that is cut is another one."""
    return np.dtype(NUMPY_TYPES[wanted]).kind == np.dtype(NUMPY_TYPES[given]).kind


def _listed(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} is {there}" for name, there in pairs.items())


def _fits(shape: Sequence[int | str | None], wanted: Sequence[int | str | None]) -> bool:
    sizes = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and not any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
