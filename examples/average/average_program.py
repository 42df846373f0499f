"""A program of a new kind: the average of two denoisers at every step, each evaluated in full every few steps only.

In between, a network's graph `reuse` goes on from what its graph `full` computed last.
"""

# --8<-- [start:program]
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from dexport.contract import LABEL, MEMORY, PREDICTION, STATE, TIME, Clock, Graph, Route
from dexport.errors import GateError
from dexport.runtime.draws import Draws
from dexport.runtime.programs.program import (
    LATENTS,
    PICTURES,
    Calls,
    Graphs,
    Network,
    Program,
    Request,
    Role,
    Step,
    check_condition,
)

FULL, REUSE = "full", "reuse"


@dataclass(frozen=True, kw_only=True)
class Average(Program):
    """Rectified flow along the mean velocity of two networks.

    Attributes:
        steps: Euler steps from noise (time 1) to the picture (time 0).
        full: which steps are evaluated in full: one in `every`.
    """

    kind: ClassVar[str] = "average"
    roles: ClassVar[Mapping[str, Role]] = {
        "denoiser": Role(graphs=(frozenset({FULL, REUSE}),), least=2, most=2, agree=(STATE,))
    }
    settings: ClassVar[tuple[str, ...]] = ("steps", "full")

    steps: Annotated[int, Meta(ge=1, le=1000)] = 8
    full: Route = Route(every=2)  # noqa: RUF009 - it cannot be changed

    @property
    def clock(self) -> Clock:
        return Clock(0.0, 1.0)

    def run(self, calls: Calls, request: Request, draws: Draws) -> Iterator[Step]:
        check_condition(self.condition, request)
        networks = calls["denoiser"]
        labels = np.array(request.labels, np.int64)
        shape = _shape(networks[0].graphs)
        x, memories = draws.normal((request.count, *shape)), [None] * len(networks)
        for index in range(self.steps):
            time = np.full(request.count, 1 - index / self.steps, np.float32)
            in_full = index % (self.full.every or 1) == 0
            velocities = []
            for number, network in enumerate(networks):
                graph = FULL if in_full else REUSE
                velocity, memory = _evaluate(network, graph, x, time, labels, memories[number])
                memories[number] = memory if in_full else memories[number]
                velocities.append(velocity)
            x = (x - np.mean(velocities, axis=0) / self.steps).astype(np.float32)
            results = _results(x) if index == self.steps - 1 else {}
            yield Step(index, float(time[0]), x, results)
        if not np.isfinite(x).all():
            raise GateError("it made values that are not finite", hint="build it with --fp32")

    def makes(self, networks: Graphs) -> Mapping[str, tuple[int, ...]]:
        channels, height, width = _shape(networks["denoiser"][0])
        return {LATENTS: (channels, height, width), PICTURES: (height, width, channels)}


def _evaluate(
    network: Network, name: str, x: np.ndarray, time: np.ndarray, labels: np.ndarray, memory: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The velocity, and what the graph leaves for the next steps."""
    graph = network.graphs[name]
    given = {STATE: x, TIME: time, LABEL: labels, MEMORY: memory}
    outputs = network(name, **{port.name: given[port.role] for port in graph.inputs})
    found = {port.role: outputs[port.name] for port in graph.outputs}
    return found[PREDICTION], found.get(MEMORY)


def _shape(graphs: Mapping[str, Graph]) -> tuple[int, int, int]:
    state = graphs[FULL].input(STATE)
    assert state is not None
    channels, height, width = (int(size) for size in state.shape[1:])
    return channels, height, width


def _results(x: np.ndarray) -> dict[str, np.ndarray]:
    if not np.isfinite(x).all():
        return {}
    pictures = np.clip((x + 1) * 127.5, 0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return {LATENTS: x, PICTURES: pictures}


# --8<-- [end:program]
