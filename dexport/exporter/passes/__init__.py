"""Graph passes: each takes an onnx-ir model, changes it in place, and says whether it did.

No pass forces a weight into memory: new weights are lazy functions of old ones.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from dexport.exporter.passes.fold_constants import FoldConstants
from dexport.exporter.passes.fold_weight_transposes import FoldWeightTransposes
from dexport.exporter.passes.infer_shapes import InferShapes
from dexport.exporter.passes.name_by_module import NameByModule
from dexport.exporter.passes.remove_redundant import RemoveRedundant
from dexport.exporter.passes.share_constants import ShareConstants
from dexport.exporter.passes.static_reshape import StaticReshape


def clean() -> ir.passes.PassManager:
    """What every traced graph goes through."""
    return ir.passes.PassManager(
        [
            FoldConstants(),
            StaticReshape(),
            FoldWeightTransposes(),
            common.RemoveUnusedNodesPass(),
            common.CommonSubexpressionEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            ShareConstants(),
            RemoveRedundant(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            NameByModule(),
            InferShapes(),
        ]
    )


def op_histogram(model: ir.Model) -> dict[str, int]:
    """Number of nodes per operator type, most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
