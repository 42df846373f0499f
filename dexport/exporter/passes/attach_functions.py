"""Give every custom-op node its ONNX function, so that the file runs where there is no plugin."""

from __future__ import annotations

import onnx_ir as ir

from dexport.plugins.functions import MINIMUM_OPSET, function_protos
from dexport.plugins.op import DOMAIN
from dexport.plugins.registry import find_op

DOMAIN_VERSION = 1


class AttachFunctions(ir.passes.InPlacePass):
    """Add the functions of the ops that the graph uses, and the domain's opset import.

    Run it last: passes that look into functions, or that drop unknown ones, then have nothing to say.

    Args:
        wide: functions that compute in float32 whatever their inputs are; see each op's page.
    """

    def __init__(self, *, wide: bool = False) -> None:
        self.wide = wide

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        used = dict.fromkeys(node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN)
        if not used:
            return ir.passes.PassResult(model, modified=False)
        opset = max(model.opset_imports.get("", MINIMUM_OPSET), MINIMUM_OPSET)
        for name in used:
            for proto in function_protos(find_op(name), opset=opset, wide=self.wide):
                function = ir.serde.deserialize_function(proto)
                model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=True)
