"""How one layer is stored, and which gate judges a network that has such layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FLOAT, INT8, W8A8, INT4, TERNARY = "float", "int8", "w8a8", "int4", "ternary"
SCHEMES = (FLOAT, INT8, W8A8, INT4, TERNARY)
"""From the most exact to the least: the build's own precision; INT8 weights; INT8 weights and activations; INT4 weights
in blocks; ternary weights."""
LOW_BITS = (INT4, TERNARY)
"""Weights that are rounded along a calibration; plain rounding would lose too much."""
UNIFORM = {"weight": INT8, "w8a8": W8A8}
"""What ``BuildOptions.int8`` takes -> the scheme of every layer, by which ``--quantize`` calls it."""


def quantised_layers(schemes: Mapping[str, str]) -> tuple[str, ...]:
    """The layers that do not stay in floating point."""
    return tuple(path for path, scheme in schemes.items() if scheme != FLOAT)


def gate_of(schemes: Iterable[str], precision: str) -> str:
    """The name of the gate of a network: that of its least exact scheme, or of its precision where all is float."""
    worst = max(schemes, key=SCHEMES.index, default=FLOAT)
    return precision if worst == FLOAT else worst
