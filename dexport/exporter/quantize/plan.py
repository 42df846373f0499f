"""What a build quantises, and its application to a graph."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from dexport.errors import InputError
from dexport.exporter.passes.lazy import static_shape
from dexport.exporter.quantize.activations import quantise_input, quantise_output
from dexport.exporter.quantize.layers import Layer, graph_layers
from dexport.exporter.quantize.low_bits import LowBits, carrier_of, store_low_bits
from dexport.exporter.quantize.observer import Statistics
from dexport.exporter.quantize.rounded import RoundedWeights
from dexport.exporter.quantize.schemes import INT8, LOW_BITS, W8A8, quantised_layers
from dexport.exporter.quantize.smooth import fold_into_modulation, migration, smooth_threshold
from dexport.exporter.quantize.weights import quantise_weight

SMOOTHED = "w8a8 smoothed"
"""A W8A8 layer whose spread between channels SmoothQuant moved into the weights."""


@dataclass(frozen=True)
class Plan:
    """How a graph is quantised.

    Attributes:
        schemes: module path -> scheme, for every layer.
        statistics: of a calibration, for the layers in W8A8.
        method: how thresholds are chosen from them.
        rounded: the weights of the layers in INT4 and ternary.
        carriers: how these two are stored.
    """

    schemes: Mapping[str, str]
    statistics: Statistics = field(default_factory=dict)
    method: str = "mse"
    rounded: RoundedWeights | None = None
    carriers: Mapping[str, str] = field(default_factory=dict)

    def apply(self, model: ir.Model, *, partial: bool = False) -> dict[str, str]:
        """Quantise the graph in place; returns what was done to each layer: its scheme, or ``w8a8 smoothed``.

        Args:
            partial: the graph may lack layers, as one of several graphs of a network.

        Raises:
            InputError: the schemes or the statistics are of other layers than the graph has.
        """
        layers = graph_layers(model)
        wanted = {path: self.schemes[path] for path in quantised_layers(self.schemes)}
        if partial:
            wanted = {path: scheme for path, scheme in wanted.items() if path in layers}
        else:
            _check_layers("the precision map", wanted, layers)
            _check_layers("the calibration", self.statistics, layers)
        _check_layers("the graph", [path for path in wanted if wanted[path] == W8A8], self.statistics)
        return {path: self._quantise(model.graph, layers[path], scheme) for path, scheme in wanted.items()}

    def _quantise(self, graph: ir.Graph, layer: Layer, scheme: str) -> str:
        if scheme == INT8:
            quantise_weight(graph, layer)
            return scheme
        if scheme in LOW_BITS:
            self._store_low_bits(graph, layer, scheme)
            return scheme
        return self._quantise_both(graph, layer)

    def _store_low_bits(self, graph: ir.Graph, layer: Layer, scheme: str) -> None:
        assert self.rounded is not None and layer.weight.const_value is not None
        shape = static_shape(layer.weight.const_value)
        rows, columns = shape[layer.output_axis], shape[layer.input_axis]
        weight = LowBits(layer, scheme, rows, columns, functools.partial(self.rounded.load, layer.path, scheme))
        store_low_bits(graph, weight, carrier_of(rows, self.carriers[scheme]))

    def _quantise_both(self, graph: ir.Graph, layer: Layer) -> str:
        """Weight and activations."""
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
        return W8A8


def _check_layers(what: str, has: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(has) - set(known))
    if unknown:
        raise InputError(
            f"{what} has layers that are not known elsewhere: {', '.join(unknown)}",
            hint="calibrate this variant, with the same precision map",
        )
