"""The PyTorch network with weights as a plan would store them, and how far its predictions and latents move.

Activations stay in floating point: what is measured is what the weights lost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from dexport.contract import PREDICTION, STATE
from dexport.exporter.quantize.rounded import RoundedWeights
from dexport.exporter.quantize.schemes import FLOAT, INT8
from dexport.exporter.quantize.weights import channel_scale, quantise
from dexport.exporter.trajectory import RecordingNetwork, TorchNetwork, program_of, run_steps
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.calls import Call, last_step
from dexport.runtime.programs.program import Step

STEPS = 20
SEEDS = (0, 1)
"""Noise of the trajectories whose final latents are compared: that of ``dexport validate``, and another."""
IMAGES = 2
"""Of each seed, and of the states at which single predictions are compared."""
STATES = 4
"""Evenly spread over the trajectory."""


class Simulation:
    """A network whose weights can be exchanged for a while.

    Args:
        rounded: where the weights in INT4 and ternary are.
    """

    def __init__(self, variant: Variant, weights: WeightSource, rounded: RoundedWeights) -> None:
        self._variant = variant = with_guidance(variant)
        self._module = load_into(weights, variant.meta_module()).eval()
        self._network = TorchNetwork(variant, self._module)
        self._rounded = rounded
        self._wanted: dict[int, np.ndarray] = {}

    @contextlib.contextmanager
    def storing(self, schemes: Mapping[str, str]) -> Iterator[None]:
        """Run the block with the weights of these layers as they would be stored."""
        kept: dict[str, Tensor] = {}
        try:
            for path, scheme in schemes.items():
                if scheme != FLOAT:
                    weight = self._weight(path)
                    kept[path] = weight.data
                    weight.data = self._stored(weight.data, path, scheme)
            yield
        finally:
            for path, data in kept.items():
                self._weight(path).data = data

    def snr_db(self, schemes: Mapping[str, str]) -> float:
        """SNR of the final latents against those of the weights as they are, from the same noise: the lower of two
        seeds'. As :mod:`dexport.validate.levels.trajectory` defines it."""
        if not self._wanted:
            self._wanted = {seed: self._latents(seed) for seed in SEEDS}
        with self.storing(schemes):
            return min(_snr_db(self._wanted[seed], self._latents(seed)) for seed in SEEDS)

    def states(self) -> list[Call]:
        """Calls that the program makes on the way."""
        recorder = RecordingNetwork(self._variant, self._module)
        for _ in self._run(recorder, SEEDS[0]):
            pass
        return [recorder.made[index] for index in np.linspace(0, len(recorder.made) - 1, STATES).round().astype(int)]

    def predictions(self, states: list[Call]) -> list[np.ndarray]:
        """What the network predicts at each of these calls, guided where it is, without the variance."""
        return [self._prediction(call, self._network(call.graph, **call.inputs)) for call in states]

    def _prediction(self, call: Call, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        graph = self._network.graphs[call.graph]
        state, port = graph.input(STATE), graph.output(PREDICTION) or graph.outputs[0]
        return outputs[port.name] if state is None else outputs[port.name][:, : call.inputs[state.name].shape[1]]

    def _latents(self, seed: int) -> np.ndarray:
        return last_step(self._run(self._network, seed)).state

    def _run(self, network: TorchNetwork, seed: int) -> Iterator[Step]:
        numbers = range(seed * IMAGES, (seed + 1) * IMAGES)
        return run_steps(self._variant, network, numbers, len(SEEDS) * IMAGES, seed, STEPS)

    def _weight(self, path: str) -> nn.Parameter:
        weight = self._module.get_submodule(path).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _stored(self, weight: Tensor, path: str, scheme: str) -> Tensor:
        if scheme != INT8:
            return self._rounded.load(path, scheme).weight().reshape(weight.shape)
        scale = channel_scale(weight, 0).reshape(-1, *(1 for _ in weight.shape[1:]))
        return quantise(weight, scale) * scale


def with_guidance(variant: Variant) -> Variant:
    """The network with its guidance inside, where it has any: a sampler goes by guided predictions, and guidance
    multiplies errors."""
    program = program_of(variant) if variant.within is None else variant.within.program
    graph = None if program is None else program.fused
    if graph is None or variant.recipe.guidance is None or len(variant.plain.outputs) > 1:
        return variant
    return replace(variant, graphs=(graph,), graph=graph)


def relative_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """Squared: the energy of the difference over that of what is wanted; infinite where values are not finite."""
    difference = np.square(got.astype(np.float64) - wanted).sum()
    energy = np.square(wanted.astype(np.float64)).sum()
    return float(difference / energy) if np.isfinite(difference) and energy > 0 else math.inf


def _snr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    error = relative_error(wanted, got)
    return math.inf if error == 0 else -10 * math.log10(error) if math.isfinite(error) else -math.inf
