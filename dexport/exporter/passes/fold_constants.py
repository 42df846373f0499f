"""Fold what depends on constants only, such as shape arithmetic; weights are larger than the limit and stay."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir

INPUT_LIMIT = 512
OUTPUT_LIMIT = 16_384


class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's folding, without its per-node shape inference, which takes a hundred times as long here."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = fold_constants_ir(
            model,
            onnx_shape_inference=False,
            input_size_limit=INPUT_LIMIT,
            output_size_limit=OUTPUT_LIMIT,
            should_fold=_unless_it_reads_a_weight,
        )
        return ir.passes.PassResult(model, result.modified)


def _unless_it_reads_a_weight(node: ir.Node) -> bool | None:
    """onnxscript folds a Transpose whatever its size, which would hold every transposed weight in memory."""
    constants = (v.const_value for v in node.inputs if v is not None and v.is_initializer())
    if any(c is not None and (isinstance(c, ir.LazyTensor) or c.size > INPUT_LIMIT) for c in constants):
        return False
    return None
