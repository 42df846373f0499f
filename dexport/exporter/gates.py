"""The gates of a network: one table, by its precision or by its least exact scheme; or what a budget asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dexport.errors import InputError
from dexport.verdict import relative_l2_of


@dataclass(frozen=True)
class Limits:
    """What one precision or scheme may cost.

    Attributes:
        relative_l2: largest error of one evaluation.
        snr_db: smallest signal-to-noise ratio of the final latents.
        distance_share: largest delta of the Fréchet distance, as a share of PyTorch's own: evaluators differ in scale.
        op_l2: largest error of a custom op that computes in this type, as in ``tests/plugins/test_agreement.py``; only
            of types that ONNX Runtime has kernels for.
    """

    relative_l2: float
    snr_db: float
    distance_share: float
    op_l2: float = 0.0


GATES: Mapping[str, Limits] = {
    "fp32": Limits(5e-6, 60.0, 0.005, op_l2=5e-6),
    "fp16": Limits(3e-3, 25.0, 0.01, op_l2=2e-3),
    "bf16": Limits(3e-2, 10.0, 0.03),
    "int8": Limits(2e-2, 20.0, 0.03),
    "w8a8": Limits(5e-2, 10.0, 0.1),
    "int4": Limits(7e-2, 10.0, 0.1),
    "ternary": Limits(5e-1, 5.0, 0.5),
}
"""Quantised: about twice the error that the trained small models show (8e-3..1.2e-2 for INT8 weights, 1.7e-2..2.1e-2
for W8A8, 1.1e-2..3.7e-2 for INT4, 7e-2..2.5e-1 for ternary). A gate says that the file is what its scheme can be;
whether that is fit to ship is another question (:data:`dexport.verdict.SHIPPABLE_SNR_DB`)."""


@dataclass(frozen=True)
class NetworkGates:
    """What judges one network.

    Attributes:
        name: of the row of :data:`GATES`, its least exact scheme or its precision.
        relative_l2, snr_db, distance_share: as in :class:`Limits`; of a budget where one was given.
        block_l2: largest own error of a block: that of the row, as a budget says nothing of single blocks.
    """

    name: str
    relative_l2: float
    snr_db: float
    distance_share: float
    block_l2: float


def gates_for(name: str, own: Mapping[str, float], budget_snr_db: float | None = None) -> NetworkGates:
    """The gates of a network.

    Args:
        name: its least exact scheme, or its precision.
        own: the recipe's largest relative L2 by such names.
        budget_snr_db: what ``--quantize budget=snr>=DB`` asked for. It judges whatever schemes were chosen to meet it.

    Raises:
        InputError: a name that no gate has.
    """
    if name not in GATES:
        raise InputError(
            f"there is no gate {str(name)!r}", hint=f"there are {', '.join(GATES)}: build the bundle again"
        )
    limits = GATES[name]
    largest = own.get(name, limits.relative_l2)
    if budget_snr_db is None:
        return NetworkGates(name, largest, limits.snr_db, limits.distance_share, largest)
    # No file is closer to PyTorch than float32 is.
    asked = max(relative_l2_of(budget_snr_db), GATES["fp32"].relative_l2)
    known = (row.distance_share for row in GATES.values() if row.relative_l2 >= asked)
    share = min(known, default=limits.distance_share)
    return NetworkGates(name, asked, budget_snr_db, share, largest)


def gates_of(precision: Mapping[str, Any], own: Mapping[str, float]) -> NetworkGates:
    """The gates of a built network, from the ``precision`` section of its manifest."""
    budget = precision.get("budget")
    asked = budget.get("asked_snr_db") if isinstance(budget, Mapping) else None
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int | float) or not asked > 0):
        raise InputError("the manifest records a budget that is no SNR", hint="build the bundle again")
    return gates_for(precision.get("gate", precision["name"]), own, asked)
