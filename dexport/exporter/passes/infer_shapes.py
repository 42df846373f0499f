"""ONNX shape inference that reads no weight."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


class InferShapes(ir.passes.InPlacePass):
    """onnx-ir's pass serializes small initializers; lazy ones are set aside while it runs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        weights = {
            value: value.const_value
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, (ir.LazyTensor, ir.ExternalTensor))
        }
        for value in weights:
            value.const_value = None
        try:
            result = common.ShapeInferencePass()(model)
        finally:
            for value, tensor in weights.items():
                value.const_value = tensor
        return ir.passes.PassResult(model, result.modified)
