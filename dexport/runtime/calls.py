"""Networks as programs call them: sessions behind graphs, calls that are recorded, and a rehearsal without networks."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dexport.contract import TIME, Condition, Graph
from dexport.errors import GateError, UsageError
from dexport.runtime.batches import InBatches
from dexport.runtime.draws import Draws
from dexport.runtime.inputs import TIME_TOLERANCE
from dexport.runtime.programs.program import Calls, Graphs, Network, Program, Request, Step

Session = Callable[..., Mapping[str, np.ndarray]]


class SessionNetwork:
    """A network whose graphs run in sessions.

    Args:
        graphs: its ports.
        open_graph: opens the session of a graph, when it is called for the first time.

    Attributes:
        runner: what runs; empty before a session is open.
    """

    def __init__(self, graphs: Mapping[str, Graph], open_graph: Callable[[str], Session]) -> None:
        self.graphs = graphs
        self.runner = ""
        self._open_graph = open_graph
        self._sessions: dict[str, InBatches] = {}

    def open(self, graph: str) -> InBatches:
        """The session of a graph, in batches that it takes."""
        if graph not in self._sessions:
            self._sessions[graph] = session = InBatches(self._open_graph(graph))
            self.runner = self.runner or session.runner
        return self._sessions[graph]

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.open(graph)(**inputs)


@dataclass(frozen=True, eq=False)
class Call:
    """One evaluation: of which role's network, which graph, and its arrays by name."""

    role: str
    index: int
    graph: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


class Recorder:
    """Keeps every call of a run.

    Attributes:
        calls: the networks to run a program with.
        made: the calls so far.
    """

    def __init__(self, calls: Calls) -> None:
        self.made: list[Call] = []
        self.calls: Calls = {
            role: [_Recorded(network, role, index, self.made) for index, network in enumerate(networks)]
            for role, networks in calls.items()
        }


class _Recorded:
    def __init__(self, network: Network, role: str, index: int, made: list[Call]) -> None:
        self.graphs = network.graphs
        self.inputs = getattr(network, "inputs", None)
        self._network, self._role, self._index, self._made = network, role, index, made

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        outputs = self._network(graph, **inputs)
        self._made.append(Call(self._role, self._index, graph, inputs, outputs))
        return outputs


class _Absent:
    """A network that answers zeros, of the shapes of its ports."""

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        self.graphs = graphs

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        ports = self.graphs[graph]
        missing = {port.name for port in ports.inputs} ^ set(inputs)
        if missing:
            raise UsageError(f"the graph {graph} takes {', '.join(port.name for port in ports.inputs)}")
        rows = max((len(array) for array in inputs.values() if np.ndim(array)), default=1)
        return {port.name: np.zeros(port.dims(rows), port.dtype) for port in ports.outputs}


def rehearse(program: Program, graphs: Graphs) -> list[Call]:
    """The calls that a program makes for one image, with networks that answer zeros: nothing is loaded or computed.

    Raises:
        UsageError: the program cannot run these networks, or not with its settings.
    """
    program.check(graphs)
    small = program.smallest(graphs)
    recorder = Recorder({role: [_Absent(each) for each in networks] for role, networks in small.items()})
    with contextlib.suppress(GateError):  # zeros mean nothing
        for _ in program.run(recorder.calls, example_request(program.condition, [0], 1), Draws(0, images=[0])):
            pass
    check_times(recorder.made, graphs)
    return recorder.made


def check_times(calls: Sequence[Call], graphs: Graphs) -> None:
    """Refuse calls at times that a graph does not take: those of a table are all that it knows.

    Raises:
        UsageError: so it is.
    """
    for call in calls:
        port = graphs[call.role][call.index][call.graph].input(TIME)
        if port is None or not port.choices:
            continue
        table = np.asarray(port.choices, np.float32)
        times = call.inputs[port.name].reshape(-1)
        nearest = table[np.abs(times[:, None] - table).argmin(axis=1)]
        if not np.allclose(times, nearest, rtol=TIME_TOLERANCE, atol=TIME_TOLERANCE):
            raise UsageError(
                f"the {call.role} was built for {len(table)} times, and these settings need others",
                hint="leave out --steps and --sampler, or build it for these times",
            )


def example_request(condition: Condition, numbers: Sequence[int], total: int) -> Request:
    """A request for some of ``total`` images: classes evenly spread over all that there are."""
    classes = condition.classes or 1

    def label(number: int) -> int:
        return number * classes // total if total < classes else number % classes

    labels = tuple(map(label, numbers)) if condition.kind == "class" else ()
    return Request(len(numbers), labels)


def last_step(steps: Iterable[Step]) -> Step:
    """The last of the steps of a run."""
    found = deque(steps, maxlen=1)
    if not found:
        raise UsageError("no step was executed")
    return found[0]
