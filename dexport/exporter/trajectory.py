"""A network in PyTorch along the run of its program: what calibration, ranges and step tables observe."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from dexport.contract import TIME
from dexport.errors import GateError, InputError, UsageError
from dexport.exporter.recipes.diffusion import diffusion
from dexport.exporter.torch_session import TorchSession
from dexport.exporter.variant import TimeTable, Variant, resolve
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.calls import Call, example_request, rehearse
from dexport.runtime.draws import Draws
from dexport.runtime.programs.program import Calls, Network, Program, Step

STEPS = "steps"


class TorchNetwork:
    """The graphs of a network on one module in PyTorch, as programs call them.

    Attributes:
        time: of the call in progress; 0 where the graph has none.
    """

    def __init__(self, variant: Variant, module: nn.Module) -> None:
        self.graphs = {name: signature.graph for name, signature in variant.signatures.items()}
        self.time = 0.0
        self._sessions = {each.graph: TorchSession(each.wrap(module), each.signature) for each in variant.each}

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        port = self.graphs[graph].input(TIME)
        if port is not None:
            self.time = float(inputs[port.name].flat[0])
        return self._sessions[graph](**inputs)


class RecordingNetwork(TorchNetwork):
    """One that keeps every call."""

    def __init__(self, variant: Variant, module: nn.Module) -> None:
        super().__init__(variant, module)
        self.made: list[Call] = []

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        outputs = super().__call__(graph, **inputs)
        self.made.append(Call("", 0, graph, inputs, outputs))
        return outputs


def program_of(variant: Variant) -> Program | None:
    """The program of the system that is this network; None where it runs by itself only.

    Raises:
        InputError: facts or ports that no program runs; the recipe is named.
    """
    recipe = variant.recipe
    if recipe.program is not None:
        program = recipe.program(variant.config, variant.signatures)
    elif recipe.sampling is not None:
        program = diffusion(recipe, variant.config, variant.signatures)
    else:
        return None
    return program if variant.table is None else program.with_settings(steps=variant.table.steps)


def role_of(program: Program) -> str:
    """The role that the network plays in a system of one."""
    return next(iter(program.roles))


def check_program(variant: Variant) -> None:
    """Refuse a network that its program cannot run.

    Raises:
        InputError: the recipe describes such a network; it is named, what was declared and what is expected.
        UsageError: settings make it one.
    """
    program = program_of(variant)
    if program is None:
        return
    graphs = {name: signature.graph for name, signature in variant.signatures.items()}
    try:
        program.check({role_of(program): [graphs]})
    except UsageError as error:
        message, hint = f"{variant.recipe.name}: {error}", error.hint or "correct the recipe"
        described = resolve(variant.recipe, graphs=variant.graphs)
        if (variant.config, variant.latent) == (described.config, described.latent):
            raise InputError(message, hint) from error
        check_program(described)
        raise UsageError(message, hint) from error


def with_table(variant: Variant, steps: int | None) -> Variant:
    """The variant for one number of steps: its graphs take the times of this run only.

    Raises:
        UsageError: the network has no program with steps, or one that it cannot run with so many.
    """
    if steps is None:
        return variant
    program = program_of(variant)
    if program is None or STEPS not in program.settings:
        raise UsageError(f"{variant.recipe.name} has no steps to fold", hint="leave out --fold-steps")
    chosen = program.with_settings(steps=steps)
    graphs = {name: signature.graph for name, signature in variant.signatures.items()}
    times: dict[float, None] = {}
    for call in rehearse(chosen, {role_of(chosen): [graphs]}):
        port = graphs[call.graph].input(TIME)
        if port is not None:
            times.update(dict.fromkeys(call.inputs[port.name].reshape(-1).tolist()))
    _ = variant.time_input
    return replace(variant, table=TimeTable(steps, tuple(times)))


def run_steps(
    variant: Variant, network: TorchNetwork, numbers: Sequence[int], total: int, seed: int, steps: int
) -> Iterator[Step]:
    """Run a network along its program, with classes evenly spread over all that there are.

    Args:
        numbers: of the images, of ``total``.
        steps: of the program, where it has steps.
    """
    within = variant.within
    program = program_of(variant) if within is None else within.program
    assert program is not None, "only the network of a program is run"
    calls: Calls = {role_of(program): [network]} if within is None else within.calls(network)
    if STEPS in program.settings:
        program = program.with_settings(steps=steps)
    request = example_request(program.condition, numbers, total)
    with contextlib.suppress(GateError):  # what is not finite is for those to say who watch
        yield from program.run(calls, request, Draws(seed, images=numbers))


@dataclass
class Within:
    """A network's place in a system that is being built; see :class:`~dexport.exporter.variant.Surroundings`.

    Attributes:
        name: of the network.
        networks: all of the system, by name.
        sources: their weights, once they are open.
    """

    program: Program
    name: str
    networks: Mapping[str, Variant]
    sources: Mapping[str, WeightSource] = field(default_factory=dict)
    _opened: dict[str, TorchNetwork] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        origins = {name: [source.origin.sha256, source.origin.seed] for name, source in self.sources.items()}
        return json.dumps([self.program.to_json(), self.name, origins])

    def calls(self, network: Network) -> Calls:
        roles: dict[str, list[Network]] = {}
        for name in self.networks:
            roles.setdefault(name.partition(".")[0], []).append(network if name == self.name else self._other(name))
        return roles

    def _other(self, name: str) -> TorchNetwork:
        if name not in self._opened:
            variant = self.networks[name]
            module = load_into(self.sources[name], variant.meta_module()).eval()
            self._opened[name] = TorchNetwork(variant, module)
        return self._opened[name]
