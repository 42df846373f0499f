"""The table of ONNX operators that tests share is the one that torch reads for each export."""

from __future__ import annotations

from typing import Any

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from dexport.exporter.trace import DEFAULT_OPSET
from tests.torch_operators import READ


def described(registry: ONNXRegistry) -> dict[str, list[Any]]:
    return {
        str(target): [(f.onnx_function, f.signature, f.is_custom, f.is_complex, f.opset_introduced) for f in functions]
        for target, functions in registry.functions.items()
    }


def test_the_shared_table_is_torch_s() -> None:
    shared = ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET)
    read = READ(opset_version=DEFAULT_OPSET)
    assert shared.opset_version == read.opset_version == DEFAULT_OPSET
    assert len(shared.functions) > 300
    assert described(shared) == described(read)


def test_an_operator_of_one_export_is_not_in_the_next() -> None:
    sine = torch.ops.aten.sin.default
    before = described(ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET))
    one = ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET)
    one.register_op(sine, lambda x: x)
    assert described(one) != before
    assert described(ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET)) == before
