"""The tables of ONNX operators that tests share are those that torch makes for each export."""

from __future__ import annotations

from typing import Any

import torch
from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.exporter._registration import ONNXRegistry

from dexport.exporter.tracing.trace import DEFAULT_OPSET
from tests.torch_operators import DECOMPOSE, READ


def described(registry: ONNXRegistry) -> dict[str, list[Any]]:
    return {
        str(target): [(f.onnx_function, f.signature, f.is_custom, f.is_complex, f.opset_introduced) for f in functions]
        for target, functions in registry.functions.items()
    }


def test_the_shared_table_is_torch_s() -> None:
    shared, read = ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET), READ(opset_version=DEFAULT_OPSET)
    assert shared.opset_version == read.opset_version == DEFAULT_OPSET
    assert len(shared.functions) > 300
    # Some modules of torch register operators of theirs when they are imported, maybe after the shared table was read.
    late = {name for name in set(described(read)) - set(described(shared)) if name.startswith("quantized_decomposed::")}
    assert described(shared) == {name: each for name, each in described(read).items() if name not in late}
    operators = set(_decomp.get_onnx_implemented_overloads(read))
    shared_rules, rules = _decomp.create_onnx_friendly_decomposition_table(operators), DECOMPOSE(operators)
    assert list(shared_rules) == list(rules) != []


def test_what_one_export_adds_is_not_in_the_next() -> None:
    before = ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET)
    changed = ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET)
    changed.register_op(torch.ops.aten.sin.default, lambda x: x)
    assert described(changed) != described(before)
    assert described(ONNXRegistry.from_torchlib(opset_version=DEFAULT_OPSET)) == described(before)
    _decomp.create_onnx_friendly_decomposition_table(set()).clear()
    assert _decomp.create_onnx_friendly_decomposition_table(set()) != {}
