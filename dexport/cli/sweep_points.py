"""The points of a sweep: values of a setting, or shares of the first of two networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dexport.contract import Route
from dexport.errors import UsageError
from dexport.runtime.opened import OpenProgram
from dexport.runtime.stitch import halves

SHARE = "share of the first network"


def shares_of(program: OpenProgram, fractions: Sequence[float]) -> dict[Any, dict[str, Any]]:
    """The settings of a sweep over the share of the first of two networks; 0, the comparison, is always among them.

    Raises:
        UsageError: not two networks, or shares outside [0, 1].
    """
    role, networks = next(iter(program.roles.items()))
    if len(networks) != 2:
        raise UsageError(
            f"{program.bundle.path} holds {len(networks)} {role}s; a sweep over shares takes two",
            hint="build one with --stitch SMALL:0.4,LARGE:0.6, or sweep another setting",
        )
    shares = {fraction: halves(fraction) for fraction in sorted({0.0, *fractions})}
    return {first: {"route": (Route(first), Route(second))} for first, (_, second) in shares.items()}


def points_of(program: OpenProgram, setting: str, values: Sequence[Any]) -> tuple[str, dict[Any, dict[str, Any]]]:
    """What changes in a sweep, in words, and its points.

    Args:
        setting: of the program; empty for the share of the first of two networks.
        values: of the setting, the first of which is the comparison.
    """
    if not setting:
        return SHARE, shares_of(program, values)
    return setting, {value: {setting: value} for value in values}
