"""What ``--int8`` asks for, and its application to a graph."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from dexport.errors import InputError, UsageError
from dexport.exporter.passes.pointwise_conv import PointwiseConvToMatMul
from dexport.exporter.quantize.activations import quantise_input, quantise_output
from dexport.exporter.quantize.layers import Layer, quantisable_layers
from dexport.exporter.quantize.observer import Statistics
from dexport.exporter.quantize.smooth import fold_into_modulation, migration, smooth_threshold
from dexport.exporter.quantize.weights import quantise_weight

SCHEMES = ("weight", "w8a8")
GATES = {"weight": "int8", "w8a8": "w8a8"}
"""Scheme -> its key among a recipe's gates."""
SMOOTHED = "w8a8 smoothed"
"""A W8A8 layer whose spread between channels SmoothQuant moved into the weights."""


@dataclass(frozen=True)
class Int8:
    """How a graph is quantised.

    Attributes:
        scheme: ``weight``, or ``w8a8`` for activations too.
        exclude: glob patterns of modules that stay in floating point.
        statistics: of a calibration, for ``w8a8``.
        method: how thresholds are chosen from them.
    """

    scheme: str
    exclude: tuple[str, ...]
    statistics: Statistics = field(default_factory=dict)
    method: str = "mse"

    def apply(self, model: ir.Model) -> dict[str, str]:
        """Quantise the graph in place; returns the scheme of every layer that was, ``w8a8 smoothed`` for some.

        Raises:
            UsageError: no layer is left to quantise.
            InputError: the statistics are of other layers than the graph has.
        """
        PointwiseConvToMatMul()(model)
        layers = quantisable_layers(model, self.exclude)
        if not layers:
            raise UsageError(
                f"nothing to quantise: every layer is excluded by {', '.join(self.exclude)}", hint="leave out --int8"
            )
        if self.scheme == "w8a8":
            self._check_layers(layers)
        return {layer.path: self._quantise(model.graph, layer) for layer in layers}

    def _quantise(self, graph: ir.Graph, layer: Layer) -> str:
        if self.scheme == "weight":
            quantise_weight(graph, layer)
            return self.scheme
        seen = self.statistics[layer.path]
        s = migration(seen)
        if fold_into_modulation(graph, layer, s):
            quantise_weight(graph, layer, torch.from_numpy(s))
            quantise_input(graph, layer, smooth_threshold(seen, s))
            return SMOOTHED
        quantise_weight(graph, layer)
        quantise_input(graph, layer, seen.input.threshold(self.method))
        if layer.node.op_type == "Conv":
            quantise_output(graph, layer, seen.output.threshold(self.method))
        return self.scheme

    def _check_layers(self, layers: list[Layer]) -> None:
        graph = {layer.path for layer in layers}
        problems = [("unknown", self.statistics.keys() - graph), ("missing", graph - self.statistics.keys())]
        found = [f"{title} {', '.join(sorted(paths))}" for title, paths in problems if paths]
        if found:
            raise InputError(
                "the calibration is not of this graph's layers: " + "; ".join(found),
                hint="calibrate this variant, with the same exclusions",
            )
