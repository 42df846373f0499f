"""Ternary weights stay ternary in the ONNX file: which layers, in which carrier, and the pass that stores them.

A weight travels alone: when the file is written, one matrix is read from the checkpoint, encoded, written and freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dexport.errors import InputError, UsageError
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.quantize.carriers import CARRIERS, Carrier, Layer
from dexport.exporter.variant import Variant
from dexport.graphs.terdit import TernaryLinear

AUTO = "auto"
FASTEST_IN_ONNXRUNTIME = "nbits4"
"""Of a TerDiT-600M on a CPU: benchmarks/results/ternary-cpu.json."""


@dataclass(frozen=True)
class TernaryStorage:
    """How a build stores the ternary layers; goes into the manifest.

    Attributes:
        weights: names of the stored matrices.
        values: how many values they hold.
        reason: half a sentence for the user.
    """

    carrier: Carrier
    weights: tuple[str, ...]
    values: int
    reason: str

    def describe(self) -> dict[str, object]:
        """JSON values for the manifest."""
        return {
            "carrier": self.carrier.name,
            "bits_per_value": self.carrier.bits,
            "exact": True,
            "layers": len(self.weights),
            "values": self.values,
            "runs_in": list(self.carrier.runs_in),
            "reason": self.reason,
        }


class StoreTernary(ir.passes.InPlacePass):
    """Rewrite every ternary layer of a traced graph; run it first, before transposes are folded into the weights.

    Raises:
        InputError: a layer that is not ``(x W^T) * scale`` of one (B, T, in) input, or that the carrier cannot hold.
    """

    def __init__(self, storage: TernaryStorage) -> None:
        self.storage = storage

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name in self.storage.weights:
            self.storage.carrier.store(model.graph, find_layer(model.graph, name))
        return ir.passes.PassResult(model, modified=bool(self.storage.weights))


def find_layer(graph: ir.Graph, name: str) -> Layer:
    """The layer around a weight."""
    weight = graph.initializers.get(name)
    transpose = _only_reader(weight, "Transpose")
    matmul = transpose and _only_reader(transpose.outputs[0], "MatMul")
    scaled = matmul and _only_reader(matmul.outputs[0], "Mul")
    if weight is None or transpose is None or matmul is None or scaled is None:
        raise InputError(
            f"{name} is not used as (x W^T) * scale with x (B, T, in), so it cannot be stored as a ternary weight",
            hint="build with --quantize none",
        )
    return Layer(weight, transpose, matmul, scaled)


def _only_reader(value: ir.Value | None, op_type: str) -> ir.Node | None:
    readers = [] if value is None else [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def choose_storage(
    variant: Variant, asked: bool | None, carrier: str, engine: EngineChoice | None, plugins: bool
) -> TernaryStorage | None:
    """How to store the layers that are ternary by construction; None for dense weights, or where there are none.

    Args:
        asked: ``--quantize ternary`` or ``none``; None for where there are ternary layers, as it is exact.
        carrier: ``auto`` or one of :data:`CARRIERS`.
        engine: what will be built from the file.
        plugins: whether that engine takes plugins.

    Raises:
        UsageError: a carrier that the engine cannot read, or none but a carrier.
    """
    layers = ternary_layers(variant)
    if asked is False and carrier != AUTO:
        raise UsageError("--ternary-carrier and --quantize none exclude each other", hint="give one of the two")
    if not layers or asked is False:
        return None
    chosen, reason = choose_carrier(carrier, engine, plugins, FASTEST_IN_ONNXRUNTIME)
    return TernaryStorage(chosen, tuple(layers), sum(layers.values()), reason)


def ternary_layers(variant: Variant) -> dict[str, int]:
    """Name of every ternary weight -> how many values it holds."""
    modules = variant.outline.named_modules()
    return {f"{path}.weight": layer.weight.numel() for path, layer in modules if isinstance(layer, TernaryLinear)}


def choose_carrier(name: str, engine: EngineChoice | None, plugins: bool, auto: str) -> tuple[Carrier, str]:
    """A carrier and half a sentence why; ``auto`` is what ``auto`` means where no engine is built."""
    if name == AUTO and engine is not None:
        return CARRIERS["int4"], f"{engine.flavour} keeps INT4 weights in the engine"
    if name == AUTO:
        return CARRIERS[auto], "the fastest exact one measured in ONNX Runtime on a CPU"
    if name not in CARRIERS:
        raise UsageError(f"there is no ternary carrier {name!r}", hint=f"choose from auto, {', '.join(CARRIERS)}")
    carrier = CARRIERS[name]
    if engine is not None and not _engine_reads(carrier.runs_in, engine.flavour, plugins):
        raise UsageError(
            f"{engine.flavour} cannot read the ternary carrier {name}, which runs in {', '.join(carrier.runs_in)}",
            hint="choose --ternary-carrier int4",
        )
    return carrier, "asked for with --ternary-carrier"


def _engine_reads(runs_in: Sequence[str], flavour: str, plugins: bool) -> bool:
    return flavour in runs_in or (plugins and f"{flavour} with plugins" in runs_in)
