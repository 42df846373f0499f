"""Keep one copy of equal constants. Weights are left alone: comparing them would mean reading them."""

from __future__ import annotations

import onnx_ir as ir


class ShareConstants(ir.passes.InPlacePass):
    """Equal initializers that are in memory already become one; the first keeps its name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        modified = False
        for name, value in list(graph.initializers.items()):
            constant = value.const_value
            if constant is None or isinstance(constant, (ir.LazyTensor, ir.ExternalTensor)):
                continue
            array = constant.numpy()
            kept = first.setdefault((constant.dtype.name, array.shape, array.tobytes()), value)
            if kept is not value and value not in graph.outputs:
                value.replace_all_uses_with(kept)
                del graph.initializers[name]
                modified = True
        return ir.passes.PassResult(model, modified)
