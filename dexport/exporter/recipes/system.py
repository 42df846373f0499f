"""A system: which networks play which roles of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dexport.exporter.recipes.recipe import Recipe, Signature
from dexport.runtime.programs.program import Program


class SettledNetwork(Protocol):
    """What a system knows of a network whose settings are decided: constructor arguments, and ports by graph."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def signatures(self) -> Mapping[str, Signature]: ...


@dataclass(frozen=True)
class System:
    """Several networks that one program runs. A network recipe with a program is a system of one role.

    Attributes:
        name: command-line name.
        family, summary, source: as of a recipe.
        roles: the recipes that play each role, or their names; the first role is the one that options are for.
        program: from the networks of each role.
    """

    name: str
    family: str
    summary: str
    source: str
    roles: Mapping[str, Sequence[str | Recipe]]
    program: Callable[[Mapping[str, Sequence[SettledNetwork]]], Program]
