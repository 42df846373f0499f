"""Ports of graphs by their roles, as programs find and check them."""

from __future__ import annotations

from dexport.contract import BATCH, Graph, Port
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


def check_port(port: Port, dtype: str, rank: int) -> None:
    if port.dtype != dtype or len(port.shape) != rank or port.shape[0] != BATCH:
        raise UsageError(
            f"{port.name} is {port.dtype} {list(port.shape)}, and a {port.role} is {dtype} of {rank} dimensions, the "
            f"first of which is {BATCH}",
            hint="declare what the network takes and returns",
        )
