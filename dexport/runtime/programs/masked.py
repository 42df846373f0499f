"""Masked generation: from nothing but mask ids to the ids of a picture, some places at each step, and to the picture.

The role ``transformer`` gives logits of every place for the ids that are known so far. In which order places are
decided, and how, is one of :mod:`~dexport.runtime.programs.masked_orders`. The role ``decoder`` is optional: without
it, the ids are the result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta
from msgspec.structs import replace

from dexport import limits
from dexport.contract import (
    BATCH,
    DROP,
    LABEL,
    LATENT,
    LOGITS,
    MEMORY,
    PICTURE,
    POSITIONS,
    STATE,
    Clock,
    Decoding,
    Graph,
    Label,
    Port,
)
from dexport.errors import GateError, UsageError
from dexport.runtime.decode import PICTURE_CHANNELS, CodeDecoder, to_uint8
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import UNGUIDED
from dexport.runtime.programs.ending import DecoderSession, player_of
from dexport.runtime.programs.masked_groups import COUNTS, IN_GROUPS, OWN_READINGS, largest_group
from dexport.runtime.programs.masked_orders import FULL, LIGHT, MODEL, PLACE_BY_PLACE, Decisions, Run, Transformer
from dexport.runtime.programs.ports import check_fed, check_label, check_port
from dexport.runtime.programs.program import IDS, PICTURES, Calls, Graphs, Program, Request, Role, Step, check_condition
from dexport.runtime.programs.recap import recap_of

ORDERS: Mapping[str, Run] = {**PLACE_BY_PLACE, **IN_GROUPS}
"""By the names of the field ``order`` of :class:`~dexport.runtime.programs.masked_orders.Decisions`."""
GRID, SEQUENCE = 3, 2
"""Dimensions of ids: (B, H, W) or (B, N)."""
PICTURE_RANK = 4
STEPS_LEFT = Clock(0.0, 1.0)
BY_NETWORK = Decoding("network")


@dataclass(frozen=True, kw_only=True)
class Masked(Decisions, Program):
    """Facts of a masked generator's sampling.

    Attributes:
        prefix: ids that the network takes before those of the places, such as the one of a class.
        decoding: how ids become pictures: by the role ``decoder``, and whose recipe that usually is.
    """

    kind: ClassVar[str] = "masked"
    roles: ClassVar[Mapping[str, Role]] = {
        "transformer": Role(graphs=(frozenset({MODEL}), frozenset({FULL}))),
        "decoder": Role(least=0),
    }
    settings: ClassVar[tuple[str, ...]] = (
        "order",
        "steps",
        "cfg_scale",
        "cfg_start",
        "cfg_rule",
        "temperature",
        "temperature_start",
        "temperature_power",
        "warmup",
        "top_k",
        "sampling_temperature",
        "choice_temperature",
        "schedule",
        "roll",
        "recap",
    )

    prefix: Annotated[tuple[Label, ...], Meta(max_length=limits.MOST_DIMENSIONS)] = ()
    decoding: Decoding = BY_NETWORK

    def __post_init__(self) -> None:
        if self.mask < self.codes:
            raise UsageError(f"the mask {self.mask} is one of {self.codes} codes", hint="it is an id behind them")
        if self.cfg_scale != UNGUIDED and self.condition.null is None:
            raise UsageError(
                f"guidance with scale {self.cfg_scale:g} needs a null class, and this model has none",
                hint="sample with --cfg 1",
            )
        if self.recap:
            recap_of(self.recap)
            if self.order not in IN_GROUPS:
                raise UsageError(
                    f"places in the order {self.order} are not decided in groups, as recap {self.recap} would",
                    hint=f"leave it out; the orders {' and '.join(IN_GROUPS)} take it",
                )

    @property
    def title(self) -> str:
        guidance = "" if self.cfg_scale == UNGUIDED else f", cfg {self.cfg_scale:g}"
        reading = " (an own reading of the paper)" if self.order in OWN_READINGS else ""
        recap = f", recap {self.recap}{reading}" if self.recap else ""
        return f"{self.steps} steps by {self.order}{guidance}{recap}"

    @property
    def clock(self) -> Clock:
        return STEPS_LEFT

    def run(
        self, calls: Calls, request: Request, draws: Draws
    ) -> Generator[Step, np.ndarray | None, None]:  # state for state, where one is sent
        """States: ids (B, N) int64, with the mask's; time: the share of steps that were left before the step.

        Results: ``ids`` int64, and ``pictures`` where they can be decoded.
        """
        check_condition(self.condition, request)
        network = calls["transformer"][0]
        graph = main_graph(network.graphs)
        null, prefix, grid = self.condition.null, self.prefix, self._grid(network.graphs)
        transformer = Transformer(network, graph, request.count, request.labels, null, prefix)
        moves = ORDERS[self.order](self, transformer, grid, draws)
        ids = np.full((request.count, math.prod(grid)), self.mask, np.int64)
        told: np.ndarray | None = None
        for index in range(self.steps):
            before = ids if told is None else told
            try:
                ids = moves.send(told)
            except GateError:
                for later in range(index, self.steps):  # every step is told, as where states are not finite
                    yield Step(later, 1 - later / self.steps, before, decided=0)
                raise
            results = self._results(ids, calls) if index == self.steps - 1 else {}
            told = yield Step(index, 1 - index / self.steps, ids, results, int((ids != before).sum()))

    def _grid(self, graphs: Mapping[str, Graph]) -> tuple[int, int]:
        return grid_of(graphs[main_graph(graphs)], len(self.prefix))

    def _results(self, ids: np.ndarray, calls: Calls) -> dict[str, np.ndarray]:
        codes = np.clip(ids, 0, self.codes - 1)
        if not calls.get("decoder"):
            return {IDS: codes}
        decode = CodeDecoder(DecoderSession(calls["decoder"][0]), self.decoding.black)
        return {IDS: codes, PICTURES: to_uint8(decode(codes))}

    def players(self) -> Mapping[str, str]:
        return player_of(self.decoding)

    def makes(self, networks: Graphs) -> Mapping[str, tuple[int, ...]]:
        transformer = networks["transformer"][0]
        made: dict[str, tuple[int, ...]] = {IDS: (math.prod(self._grid(transformer)),)}
        if networks.get("decoder"):
            channels, height, width = (int(size) for size in _port(networks["decoder"][0][MODEL], PICTURE).shape[1:])
            made[PICTURES] = (height, width, channels)
        return made

    def smallest(self, networks: Graphs) -> Graphs:
        """Logits of two ids, and small memories: what is called when does not depend on how many there are."""

        def small(port: Port) -> Port:
            size = {LOGITS: 2, MEMORY: 1}.get(port.role)
            return port if size is None else replace(port, shape=(*port.shape[:-1], size))

        return {
            role: [
                {
                    name: Graph(tuple(map(small, graph.inputs)), tuple(map(small, graph.outputs)))
                    for name, graph in graphs.items()
                }
                for graphs in players
            ]
            for role, players in networks.items()
        }

    def check(self, networks: Graphs) -> None:
        super().check(networks)
        transformer = networks["transformer"][0]
        graph = transformer[main_graph(transformer)]
        places = math.prod(self._grid(transformer))
        self._check_transformer(graph, places)
        if self.steps > places:
            raise UsageError(
                f"{self.steps} steps for {places} places, of which each step decides one or more",
                hint=f"give --steps {places} or less",
            )
        if self.order in COUNTS:
            COUNTS[self.order](self.steps, places)
        if self.recap:
            self._check_recap(transformer, places)
        for graphs in networks.get("decoder", ()):
            _check_decoder(graphs[MODEL], places)

    def _check_recap(self, graphs: Mapping[str, Graph], places: int) -> None:
        """Refuse networks without the graphs of ReCAP, and groups that a light pass cannot take."""
        if FULL not in graphs or LIGHT not in graphs:
            raise UsageError(
                f"recap {self.recap} needs the graphs {FULL} and {LIGHT}, and the bundle has {', '.join(graphs)}",
                hint=f"leave it out, or build with --graph {FULL} --graph {LIGHT} where the recipe has them",
            )
        check_memories(graphs[FULL], graphs[LIGHT])
        size = int(_port(graphs[LIGHT], POSITIONS).shape[1])
        largest = largest_group(self, places)
        if largest > size:
            raise UsageError(
                f"{self.steps} steps with recap {self.recap} make a group of {largest} places, and a light pass takes "
                f"{size}",
                hint=f"give more --steps, or build it with --set group_size={largest}",
            )

    def _check_transformer(self, graph: Graph, places: int) -> None:
        state, logits = _port(graph, STATE), _port(graph, LOGITS)
        label, drop = graph.input(LABEL), graph.input(DROP)
        check_port(state, "int64", SEQUENCE, GRID)
        check_port(logits, "float32", GRID)
        _is_one_per_picture(label, "int64")
        _is_one_per_picture(drop, "bool")
        check_fed(graph, (state, label, drop))
        check_label(label, self.condition)
        rows = places + len(self.prefix)
        if not 0 < places <= limits.LARGEST_GRID or logits.shape[1] != rows or int(logits.shape[2]) < self.codes:
            raise UsageError(
                f"{state.name} is {list(state.shape)} and {logits.name} {list(logits.shape)}; "
                f"logits are of every place and of {self.codes} codes or more",
                hint="declare what the network takes and returns",
            )
        if state.range is not None and state.range[1] < self.mask:
            raise UsageError(f"the network takes ids up to {state.range[1]}, and the mask is {self.mask}")


def main_graph(graphs: Mapping[str, Graph]) -> str:
    """The graph that is evaluated for all places."""
    return MODEL if MODEL in graphs else FULL


def check_memories(full: Graph, light: Graph) -> None:
    """Refuse a light graph that a full one does not feed.

    Raises:
        UsageError: it names the port.
    """
    kept = {port.name: port for port in full.outputs if port.role == MEMORY}
    for port in light.inputs:
        if port.role == MEMORY and kept.get(port.name) != port:
            raise UsageError(
                f"the graph {LIGHT} takes {port.name}, which {FULL} does not give so", hint="build the bundle again"
            )
        if port.role not in (MEMORY, STATE, LABEL, DROP, POSITIONS):
            raise UsageError(f"nothing feeds the input {port.name}", hint="declare its role, or leave it out")
    check_port(_port(light, STATE), "int64", SEQUENCE)
    check_port(_port(light, POSITIONS), "int64", SEQUENCE)
    check_port(_port(light, LOGITS), "float32", GRID)


def grid_of(graph: Graph, prefix: int = 0) -> tuple[int, int]:
    """Height and width of the ids behind a prefix; a sequence is a square where it can be one, else a row."""
    sizes = [int(size) for size in _port(graph, STATE).shape[1:]]
    if len(sizes) > 1:
        return sizes[0], sizes[1]
    sizes[0] -= prefix
    side = math.isqrt(sizes[0])
    return (side, side) if side * side == sizes[0] else (1, sizes[0])


def _port(graph: Graph, role: str) -> Port:
    """The port that has a role, as an input or as an output."""
    port = graph.input(role) or graph.output(role)
    if port is None:
        names = ", ".join(port.name for port in (*graph.inputs, *graph.outputs))
        raise UsageError(f"none of the ports {names} is a {role}", hint="declare the role of each port")
    return port


def _is_one_per_picture(port: Port | None, dtype: str) -> None:
    if port is not None and (port.dtype != dtype or tuple(port.shape) not in ((BATCH,), (BATCH, 1))):
        raise UsageError(
            f"{port.name} is {port.dtype} {list(port.shape)}, and a {port.role} is {dtype}, one for each picture",
            hint="declare what the network takes",
        )


def _check_decoder(graph: Graph, places: int) -> None:
    latent, picture = graph.input(LATENT), graph.output(PICTURE)
    if latent is None or picture is None or len(graph.inputs) > 1:
        names = ", ".join(port.name for port in graph.inputs)
        raise UsageError(
            f"it takes {names}, but a decoder takes ids and gives a picture",
            hint="give a bundle of the decoder that these ids were trained with",
        )
    check_port(latent, "int64", SEQUENCE, GRID)
    check_port(picture, "float32", PICTURE_RANK)
    if math.prod(int(size) for size in latent.shape[1:]) != places or picture.shape[1] not in PICTURE_CHANNELS:
        raise UsageError(
            f"the decoder takes {list(latent.shape)} and gives {list(picture.shape)}, and there are {places} ids",
            hint="build the decoder for this size",
        )
