"""Diffusion: from noise to pictures by a schedule, a sampler and guidance; several denoisers may share a trajectory.

The role ``denoiser`` takes one network, or several with a share of the trajectory each (T-Stitch, arXiv 2402.14167).
Its graph ``guided`` has the guidance rule inside; around ``model`` the rule runs here. The role ``decoder`` is
optional: without it, states that need one are the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from msgspec import Meta
from msgspec.structs import replace

from dexport import limits
from dexport.contract import (
    LABEL,
    LATENT,
    PICTURE,
    PIXELS,
    PREDICTION,
    SCALE,
    STATE,
    TIME,
    Clock,
    Decoding,
    Graph,
    GuidanceRule,
    Port,
    Route,
    Scale,
)
from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import UNGUIDED, Rule, feed_of, fused, guided
from dexport.runtime.programs.ending import GRID, MODEL, check_decoding, decoder_of, ending, player_of, results_of
from dexport.runtime.programs.ports import check_fed, check_label, check_port, input_of, output_of
from dexport.runtime.programs.program import (
    Calls,
    Graphs,
    Network,
    Program,
    Request,
    Role,
    Step,
    check_condition,
)
from dexport.runtime.samplers import WITH_VARIANCE, Denoiser, Sampler, make_sampler
from dexport.runtime.stitch import Stitch, check_fractions

GUIDED = "guided"
SAME_SCHEDULE = ({"ddpm", "ddim"},)
"""Samplers that may stand in for each other."""


@dataclass(frozen=True, kw_only=True)
class Diffusion(Program):
    """Facts of a denoiser's sampling.

    Attributes:
        schedule, prediction: in words; denoisers that share a trajectory agree on them.
        sampler: name in :data:`dexport.runtime.samplers.SAMPLERS`.
        steps: of the sampler.
        cfg_scale: of the guidance; 1 is none.
        guidance: the system's rule; None where it has none.
        decoding: how states become pictures.
        route: the share of the trajectory of each denoiser, noisiest first; empty for one.
    """

    kind: ClassVar[str] = "diffusion"
    roles: ClassVar[Mapping[str, Role]] = {
        "denoiser": Role(graphs=(frozenset({MODEL}), frozenset({GUIDED})), most=None, agree=(STATE,)),
        "decoder": Role(least=0),
    }
    settings: ClassVar[tuple[str, ...]] = ("sampler", "steps", "cfg_scale", "route")

    schedule: str
    prediction: str
    sampler: str
    steps: Annotated[int, Meta(ge=1, le=limits.MOST_STEPS)]
    cfg_scale: Scale = UNGUIDED
    guidance: GuidanceRule | None = None
    decoding: Decoding = PIXELS
    route: tuple[Route, ...] = ()

    def __post_init__(self) -> None:
        self.make_sampler()
        if self.route:
            check_fractions(self.shares)
        if self.condition.null is not None:
            self._check_null(self.condition.null)
        if self.condition.names and len(self.condition.names) != self.condition.classes:
            raise UsageError(
                f"{len(self.condition.names)} names for {self.condition.classes} classes", hint="give each a name"
            )

    def _check_null(self, null: int) -> None:
        classes = self.condition.classes
        if self.guidance is None or classes is None:
            lacking = "labels" if classes is None else "guidance rule"
            raise UsageError(f"there is a null label, {null}, and no {lacking}", hint="declare both, or neither")
        if null < classes:
            raise UsageError(
                f"the null label {null} is one of {classes} classes",
                hint="it is a row of the label table behind those of the classes",
            )

    @property
    def title(self) -> str:
        guidance = "" if self.cfg_scale == UNGUIDED else f", cfg {self.cfg_scale:g}"
        return f"{self.steps} {self.sampler} steps{guidance}"

    @property
    def clock(self) -> Clock | None:
        return self.make_sampler().clock

    @property
    def fused(self) -> str | None:
        return None if self.cfg_scale == UNGUIDED or self.condition.null is None else GUIDED

    @property
    def shares(self) -> list[float]:
        """Of the trajectory, one per denoiser; empty for one."""
        return [each.share or 0.0 for each in self.route]

    def make_sampler(self) -> Sampler:
        """The sampler of these settings."""
        return make_sampler(self.sampler, self.steps)

    def with_settings(self, **settings: Any) -> Self:
        name = settings.get("sampler")
        if name not in (None, self.sampler) and not any({name, self.sampler} <= group for group in SAME_SCHEDULE):
            make_sampler(name, self.steps)
            raise UsageError(
                f"the network was trained for {self.sampler!r}, whose schedule {name!r} does not share",
                hint="leave out --sampler",
            )
        return super().with_settings(**settings)

    def run(self, calls: Calls, request: Request, draws: Draws) -> Iterator[Step]:
        """States (B, C, H, W); results: ``latents`` float32, and ``pictures`` where they can be decoded."""
        check_condition(self.condition, request)
        sampler = self.make_sampler()
        networks = calls["denoiser"]
        denoisers = [self._denoiser(network, request.labels, sampler) for network in networks]
        denoiser = Stitch(denoisers, self.shares, sampler.remaining) if self.route else denoisers[0]
        decode = decoder_of(calls, self.decoding)
        state = _port(networks[0].graphs, STATE)
        shape = (request.count, *(int(size) for size in state.shape[1:]))
        before = None
        for step in sampler.run(denoiser, sampler.start(draws, shape), draws):
            if before is not None:
                yield before
            before = Step(step.index, step.t, step.x)
        assert before is not None, "a sampler has at least one step"
        yield from ending(before, decode)

    def players(self) -> Mapping[str, str]:
        return player_of(self.decoding)

    def makes(self, networks: Graphs) -> Mapping[str, tuple[int, ...]]:
        return results_of(self.decoding, networks, self._state(networks))

    def _state(self, networks: Graphs) -> tuple[int, int, int]:
        channels, height, width = (int(size) for size in _port(networks["denoiser"][0], STATE).shape[1:])
        return channels, height, width

    def smallest(self, networks: Graphs) -> Graphs:
        side = self.decoding.tiles  # that many cells make whole tiles

        def resized(port: Port, factor: int = 1) -> Port:
            return replace(port, shape=(*port.shape[:2], side * factor, side * factor))

        def small(graph: Graph) -> Graph:
            latent = graph.input(LATENT)
            roles = {STATE: 1, PREDICTION: 1, LATENT: 1}
            if latent is not None:
                roles[PICTURE] = int(output_of(graph, PICTURE).shape[2]) // int(latent.shape[2])
            ports = (
                tuple(resized(port, roles[port.role]) if port.role in roles else port for port in ports)
                for ports in (graph.inputs, graph.outputs)
            )
            return Graph(*ports)

        return {
            role: [{name: small(graph) for name, graph in graphs.items()} for graphs in players]
            for role, players in networks.items()
        }

    def check(self, networks: Graphs) -> None:
        super().check(networks)
        for graphs in networks["denoiser"]:
            self._check_denoiser(graph_of(graphs))
        if len(networks["denoiser"]) > 1 and not self.route:
            raise UsageError("several denoisers, and no shares of the trajectory", hint="build it again")
        state = self._state(networks)
        check_decoding(self.decoding, networks, state)
        guided = None if self.guidance is None else self.guidance.channels
        if self.decoding.factor > 1 and guided is not None and guided < state[0]:
            raise UsageError(
                f"guidance is of {guided} of {state[0]} channels, each a part of the picture",
                hint=f"--set the channels to {guided}, or describe the guidance in a recipe file",
            )

    def _check_denoiser(self, graph: Graph) -> None:
        state, time, prediction = input_of(graph, STATE), input_of(graph, TIME), output_of(graph, PREDICTION)
        label, scale = graph.input(LABEL), graph.input(SCALE)
        check_port(state, "float32", GRID)
        check_port(time, "float32", 1)
        check_port(prediction, "float32", GRID)
        check_fed(graph, (state, time, label, scale))
        if label is not None:
            check_port(label, "int64", 1)
        check_label(label, self.condition)
        channels, height, width = (int(size) for size in state.shape[1:])
        if min(channels, height, width) < 1 or channels > limits.MOST_CHANNELS:
            raise UsageError(f"the state is {list(state.shape)}", hint="every size is 1 or more")
        if height * width > limits.LARGEST_GRID or channels * height * width > limits.LARGEST_STATE:
            raise UsageError(f"the state is {list(state.shape)}; {limits.LARGEST_GRID:,} cells are the most")
        predicted = (channels, 2 * channels) if self.sampler in WITH_VARIANCE else (channels,)
        if prediction.shape[1] not in predicted or prediction.shape[2:] != state.shape[2:]:
            raise UsageError(
                f"{self.sampler} takes predictions of {' or '.join(map(str, predicted))} channels for the state "
                f"{list(state.shape)}, and {prediction.name} is {list(prediction.shape)}",
                hint="change learn_sigma or the channels with --set, or correct the recipe",
            )

    def _denoiser(self, network: Network, labels: Sequence[int], sampler: Sampler) -> Denoiser:
        name = GUIDED if GUIDED in network.graphs else MODEL
        graph = network.graphs[name]
        output = output_of(graph, PREDICTION).name

        def session(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            return {"out": network(name, **inputs)[output]}

        feed, scale = feed_of(graph, sampler.clock), graph.input(SCALE)
        if scale is not None:
            return fused(session, labels, self.cfg_scale, feed, scale.name)
        rule = Rule.of(self.guidance or GuidanceRule(), sampler.clock)
        return guided(session, labels, self.cfg_scale, self.condition.null, rule, feed)


def graph_of(graphs: Mapping[str, Graph]) -> Graph:
    """The graph of a denoiser that is evaluated."""
    return graphs[GUIDED] if GUIDED in graphs else graphs[MODEL]


def _port(graphs: Mapping[str, Graph], role: str) -> Port:
    return input_of(graph_of(graphs), role)
