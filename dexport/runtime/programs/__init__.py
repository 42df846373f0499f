"""Programs by kind: those of dexport, and own ones by the entry point group ``dexport.programs``.

An entry point names the kind and points to a subclass of :class:`~dexport.runtime.programs.program.Program`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from dexport.contract import from_json
from dexport.errors import InputError, UsageError
from dexport.printable import printable
from dexport.runtime.programs.diffusion import Diffusion
from dexport.runtime.programs.masked import Masked
from dexport.runtime.programs.masked_diffusion import MaskedDiffusion
from dexport.runtime.programs.program import Program

GROUP = "dexport.programs"
BUILT_IN: Mapping[str, type[Program]] = {program.kind: program for program in (Diffusion, Masked, MaskedDiffusion)}


def program_from_json(facts: Any, where: str) -> Program:
    """The program of a manifest.

    Args:
        where: the manifest, for messages.

    Raises:
        InputError: a kind that is not known here, or facts that it cannot have.
    """
    kind = facts.get("kind") if isinstance(facts, Mapping) else None
    if not isinstance(kind, str):
        raise InputError(f"{where}: program.kind is missing", hint="build the bundle again")
    values = {name: value for name, value in facts.items() if name != "kind"}
    try:
        return from_json(program_class(kind), values, f"{where}: program")
    except UsageError as error:  # settings that exclude each other
        raise InputError(f"{where}: program: {error}", hint=error.hint) from error


def program_class(kind: str) -> type[Program]:
    """The class of a kind of program.

    Raises:
        InputError: neither dexport nor an installed package brings it.
    """
    if kind in BUILT_IN:
        return BUILT_IN[kind]
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if kind in Program.known and kind not in found:
        return Program.known[kind]
    if kind not in found:
        raise InputError(
            f"no program of the kind {printable(kind)} is installed here",
            hint=f"install the package that brings it; there are {', '.join(sorted({*BUILT_IN, *found}))}",
        )
    loaded = found[kind].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Program) and loaded.kind == kind):
        raise InputError(
            f"the entry point {printable(kind)} of the group {GROUP} is no program of that kind",
            hint="let it name a subclass of dexport.runtime.programs.program.Program",
        )
    return loaded
