"""Ports of graphs by their roles, as programs find and check them."""

from __future__ import annotations

from collections.abc import Container

from dexport.contract import BATCH, Condition, Graph, Port
from dexport.errors import UsageError


def input_of(graph: Graph, role: str) -> Port:
    port = graph.input(role)
    if port is None:
        names = ", ".join(port.name for port in graph.inputs)
        raise UsageError(f"none of the inputs {names} is a {role}", hint="declare the role of each input")
    return port


def output_of(graph: Graph, role: str) -> Port:
    port = graph.output(role)
    if port is None:
        names = ", ".join(port.name for port in graph.outputs)
        raise UsageError(f"none of the outputs {names} is a {role}", hint="declare the role of each output")
    return port


def check_port(port: Port, dtype: str, *ranks: int) -> None:
    if port.dtype != dtype or len(port.shape) not in ranks or port.shape[0] != BATCH:
        raise UsageError(
            f"{port.name} is {port.dtype} {list(port.shape)}, and a {port.role} is {dtype} of "
            f"{' or '.join(map(str, ranks))} dimensions, the first of which is {BATCH}",
            hint="declare what the network takes and returns",
        )


def check_fed(graph: Graph, known: Container[Port | None]) -> None:
    """Refuse inputs that a program does not feed."""
    unknown = [port.name for port in graph.inputs if port not in known]
    if unknown:
        raise UsageError(f"nothing feeds the input {', '.join(unknown)}", hint="declare its role, or leave it out")


def check_label(label: Port | None, condition: Condition) -> None:
    """Refuse labels without classes, classes without labels, and classes that the network does not take."""
    if (label is not None) != (condition.kind == "class"):
        raise UsageError(
            f"the network takes {'labels' if label else 'no labels'}, and its condition is {condition.kind}",
            hint="declare both, or neither",
        )
    if label is not None and label.range is not None:
        largest = max((condition.classes or 1) - 1, condition.null or 0)
        if label.range[1] < largest:
            raise UsageError(f"the network takes labels up to {label.range[1]}, and {largest} is one")
