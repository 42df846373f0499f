"""The path of the PyTorch module that a node came from, such as ``blocks.3.attn.qkv``; empty for the root."""

from __future__ import annotations

from fnmatch import fnmatchcase

import onnx_ir as ir

METADATA_KEY = "dexport.module"
GUIDANCE = "guidance"
"""Path of the nodes that the fused guidance adds around the network."""
TIME_TABLE = "time_table"
"""Path of the nodes that find the row of a time."""


def module_path(node: ir.Node) -> str:
    return node.metadata_props.get(METADATA_KEY, "")


def set_module_path(node: ir.Node, path: str) -> None:
    node.metadata_props[METADATA_KEY] = path


def path_of_producer(node: ir.Node) -> str:
    """Where a node belongs that has no path of its own: where its inputs were computed."""
    producers = (value.producer() for value in node.inputs if value is not None)
    return next((path for p in producers if p is not None and (path := module_path(p))), "")


def inside(path: str, pattern: str) -> bool:
    """Whether ``path`` matches the glob ``pattern``, or lies below a module that does."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))
