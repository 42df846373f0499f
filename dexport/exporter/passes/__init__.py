"""Graph passes: each takes an onnx-ir model, changes it in place, and says whether it did.

No pass forces a weight into memory: new weights are lazy functions of old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from dexport.errors import UsageError
from dexport.exporter.passes.attention_on_tokens import AttentionOnTokens
from dexport.exporter.passes.channels_last import ChannelsLast
from dexport.exporter.passes.fold_constants import FoldConstants
from dexport.exporter.passes.fold_weight_transposes import FoldWeightTransposes
from dexport.exporter.passes.infer_shapes import InferShapes
from dexport.exporter.passes.name_by_module import NameByModule
from dexport.exporter.passes.pointwise_conv import PointwiseConvToMatMul
from dexport.exporter.passes.remove_redundant import RemoveRedundant
from dexport.exporter.passes.share_constants import ShareConstants
from dexport.exporter.passes.share_halves import ShareHalves
from dexport.exporter.passes.static_reshape import StaticReshape

CHANNELS_LAST = "channels-last"
SWITCHABLE: Mapping[str, Callable[[], ir.passes.InPlacePass]] = {
    "static-reshape": StaticReshape,
    "share-subexpressions": common.CommonSubexpressionEliminationPass,
    "share-constants": ShareConstants,
    "remove-redundant": RemoveRedundant,
    "share-halves": ShareHalves,
    "attention-on-tokens": AttentionOnTokens,
    CHANNELS_LAST: ChannelsLast,
}
"""Passes that a build can do without, by the name that the command line has for them."""


def check_switchable(names: Collection[str]) -> None:
    """Refuse names of no pass.

    Raises:
        UsageError: one of them is unknown; the hint lists those that there are.
    """
    for name in names:
        if name not in SWITCHABLE:
            raise UsageError(f"no pass {name!r} that can be left out", hint=f"choose from {', '.join(SWITCHABLE)}")


def clean(without: Collection[str] = ()) -> ir.passes.PassManager:
    """What every traced graph goes through.

    Args:
        without: names of :data:`SWITCHABLE` to leave out.
    """

    def unless_left_out(*names: str) -> list[ir.passes.InPlacePass]:
        return [SWITCHABLE[name]() for name in names if name not in without]

    return ir.passes.PassManager(
        [
            FoldConstants(),
            *unless_left_out("static-reshape"),
            FoldWeightTransposes(),
            common.RemoveUnusedNodesPass(),
            *unless_left_out("share-subexpressions"),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            *unless_left_out("share-constants", "remove-redundant"),
            common.RemoveUnusedNodesPass(),
            *unless_left_out("share-halves", "attention-on-tokens"),
            common.RemoveUnusedOpsetsPass(),
            NameByModule(),
            InferShapes(),
        ]
    )


def arrange_for_integers(without: Collection[str] = ()) -> ir.passes.PassManager:
    """What a clean graph goes through before its layers are quantised: 1x1 convolutions become matrix products."""
    layout = [] if CHANNELS_LAST in without else [ChannelsLast()]
    return ir.passes.PassManager([PointwiseConvToMatMul(), *layout])


def op_histogram(model: ir.Model) -> dict[str, int]:
    """Number of nodes per operator type, most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
