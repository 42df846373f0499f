"""Torch's tables of ONNX operators, read once for all tests.

``torch.onnx.export`` reads the source of some 500 functions anew for each graph, which is more than half of the time of
a small one. ``tests/exporter/test_torch_operators.py`` holds that the shared tables are those that torch makes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.exporter._registration import ONNXRegistry

READ = ONNXRegistry.from_torchlib
DECOMPOSE = _decomp.create_onnx_friendly_decomposition_table
"""As torch has them: they make a table each time."""


@functools.cache
def table(opset: int) -> ONNXRegistry:
    return READ(opset_version=opset)


@functools.cache
def decompositions(operators: frozenset[Any]) -> dict[Any, Any]:
    return DECOMPOSE(set(operators))


def copied_table(opset_version: int) -> ONNXRegistry:
    """The table for one export, which adds operators of its own to it."""
    registry = ONNXRegistry()
    registry._opset_version = opset_version
    registry.functions = {target: list(functions) for target, functions in table(opset_version).functions.items()}
    return registry


def copied_decompositions(operators: Iterable[Any]) -> dict[Any, Any]:
    return dict(decompositions(frozenset(operators)))


@contextmanager
def shared_tables() -> Iterator[None]:
    with (
        patch.object(ONNXRegistry, "from_torchlib", staticmethod(copied_table)),
        patch.object(_decomp, DECOMPOSE.__name__, copied_decompositions),
    ):
        yield
