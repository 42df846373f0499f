"""A system: which networks play which roles of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dexport.runtime.programs.program import Program

if TYPE_CHECKING:
    from dexport.exporter.variant import Variant


@dataclass(frozen=True)
class System:
    """Several networks that one program runs. A network recipe with a program is a system of one role.

    Attributes:
        name: command-line name.
        family, summary, source: as of a recipe.
        roles: the recipes that play each role, by name; the first role is the one that options are for.
        program: from the networks of each role, with every setting decided.
    """

    name: str
    family: str
    summary: str
    source: str
    roles: Mapping[str, Sequence[str]]
    program: Callable[[Mapping[str, Sequence[Variant]]], Program]
