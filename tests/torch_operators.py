"""Torch's table of ONNX operators, read once for all tests.

``torch.onnx.export`` reads the source of some 500 functions anew for each graph: more than half of the time of a small
one. ``tests/exporter/test_torch_operators.py`` holds that the shared table is the one that torch reads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.onnx._internal.exporter._registration import ONNXRegistry

READ = ONNXRegistry.from_torchlib
"""As torch has it: reads the table each time."""


@functools.cache
def table(*arguments: Any, **named: Any) -> ONNXRegistry:
    return READ(*arguments, **named)


def copied(*arguments: Any, **named: Any) -> ONNXRegistry:
    """The table for one export, which adds operators of its own to it."""
    read = table(*arguments, **named)
    registry = ONNXRegistry()
    registry._opset_version = read.opset_version
    registry.functions = {target: list(functions) for target, functions in read.functions.items()}
    return registry


@contextmanager
def shared_table() -> Iterator[None]:
    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(copied)):
        yield
