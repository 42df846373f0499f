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
    BATCH,
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
from dexport.errors import GateError, InputError, UsageError
from dexport.runtime.decode import PICTURE_CHANNELS, Decoder, PixelShuffle, VaeDecoder, clipped, to_uint8
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import UNGUIDED, Rule, feed_of, fused, guided
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
from dexport.runtime.samplers import WITH_VARIANCE, Denoiser, Sampler, make_sampler
from dexport.runtime.stitch import Stitch, check_fractions

MODEL, GUIDED = "model", "guided"
SAME_SCHEDULE = ({"ddpm", "ddim"},)
"""Samplers that may stand in for each other."""
GRID = 4
"""Dimensions of a state: (B, C, H, W)."""


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
        decode = self._decoder(calls)
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
        return {"decoder": self.decoding.recipe} if self.decoding.kind == "network" else {}

    def makes(self, networks: Graphs) -> Mapping[str, tuple[int, ...]]:
        channels, height, width = (int(size) for size in _port(networks["denoiser"][0], STATE).shape[1:])
        made: dict[str, tuple[int, ...]] = {LATENTS: (channels, height, width)}
        if self.decoding.kind == "none":
            made[PICTURES] = (height, width, channels)
        elif self.decoding.kind == "pixel-shuffle":
            factor = self.decoding.factor
            made[PICTURES] = (height * factor, width * factor, channels // factor**2)
        elif networks.get("decoder"):
            made[PICTURES] = decoded_shape(networks["decoder"][0][MODEL], height, width)
        return made

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
        state = _port(networks["denoiser"][0], STATE)
        for graphs in networks.get("decoder", ()):
            check_decoder(graphs[MODEL], int(state.shape[1]))

    def _check_denoiser(self, graph: Graph) -> None:
        state, time, prediction = input_of(graph, STATE), input_of(graph, TIME), output_of(graph, PREDICTION)
        label, scale = graph.input(LABEL), graph.input(SCALE)
        check_port(state, "float32", GRID)
        check_port(time, "float32", 1)
        check_port(prediction, "float32", GRID)
        unknown = [port.name for port in graph.inputs if port not in (state, time, label, scale)]
        if unknown:
            raise UsageError(f"nothing feeds the input {', '.join(unknown)}", hint="declare its role, or leave it out")
        if (label is not None) != (self.condition.kind == "class"):
            raise UsageError(
                f"the network takes {'labels' if label else 'no labels'}, and its condition is {self.condition.kind}",
                hint="declare both, or neither",
            )
        if label is not None:
            check_port(label, "int64", 1)
            largest = max((self.condition.classes or 1) - 1, self.condition.null or 0)
            if label.range is not None and label.range[1] < largest:
                raise UsageError(f"the network takes labels up to {label.range[1]}, and {largest} is one")
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
        if self.decoding.kind != "network":
            self._check_pictures(channels, height, width)

    def _check_pictures(self, channels: int, height: int, width: int) -> None:
        """Refuse states that are no pictures, and guidance of a part of the channels of one."""
        factor, tiles = self.decoding.factor, self.decoding.tiles
        pixels, rest = divmod(channels, factor**2)
        if rest or pixels not in PICTURE_CHANNELS:
            possible = " or ".join(str(n * factor**2) for n in PICTURE_CHANNELS)
            raise UsageError(
                f"{channels} channels become no grey or RGB picture by a pixel shuffle of {factor}",
                hint=f"--set the channels to {possible}, or describe another decoder in a recipe file",
            )
        if height * factor % tiles or width * factor % tiles:
            raise UsageError(
                f"a picture of {height * factor}x{width * factor} is no sheet of {tiles}x{tiles} equal tiles",
                hint=f"give a --latent of which {factor} times a side is a multiple of {tiles}",
            )
        guided = None if self.guidance is None else self.guidance.channels
        if factor > 1 and guided is not None and guided < channels:
            raise UsageError(
                f"guidance is of {guided} of {channels} channels, each a part of the picture",
                hint=f"--set the channels to {guided}, or describe the guidance in a recipe file",
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

    def _decoder(self, calls: Calls) -> Decoder | None:
        match self.decoding.kind:
            case "none":
                return clipped
            case "pixel-shuffle":
                return PixelShuffle(self.decoding.factor, self.decoding.tiles)
        return network_decoder(calls, self.decoding)


class DecoderSession:
    """A network of the role ``decoder`` as decoders call it."""

    def __init__(self, network: Network) -> None:
        self._network, graph = network, network.graphs[MODEL]
        self._latent, self._picture = input_of(graph, LATENT), output_of(graph, PICTURE)
        self.inputs = {"z": self._latent}

    def __call__(self, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"image": self._network(MODEL, **{self._latent.name: inputs["z"]})[self._picture.name]}


def network_decoder(calls: Calls, decoding: Decoding) -> Decoder | None:
    """The network of the role ``decoder``; None where nothing plays it."""
    networks = calls.get("decoder")
    return VaeDecoder(DecoderSession(networks[0]), decoding.scale, black=decoding.black) if networks else None


def check_decoder(graph: Graph, channels: int) -> None:
    """Refuse a graph that decodes no latents of so many channels."""
    if graph.input(LATENT) is None or graph.output(PICTURE) is None:
        names = ", ".join(port.name for port in graph.inputs)
        raise UsageError(
            f"it takes {names}, but a decoder takes a latent and gives a picture",
            hint="build sd-vae-decoder and give that bundle with --decoder",
        )
    latent, picture = input_of(graph, LATENT), output_of(graph, PICTURE)
    if len(latent.shape) != GRID or len(picture.shape) != GRID or latent.shape[1] != channels:
        raise UsageError(
            f"the decoder takes latents {list(latent.shape)} and gives {list(picture.shape)}, and states have "
            f"{channels} channels",
            hint=f"take a decoder for latents of {channels} channels",
        )


def decoded_shape(graph: Graph, height: int, width: int) -> tuple[int, int, int]:
    """The shape (H, W, C) of a picture of a latent (C, height, width)."""
    latent, picture = input_of(graph, LATENT), output_of(graph, PICTURE)
    factor = int(picture.shape[2]) // int(latent.shape[2])
    return height * factor, width * factor, int(picture.shape[1])


def graph_of(graphs: Mapping[str, Graph]) -> Graph:
    """The graph of a denoiser that is evaluated."""
    return graphs[GUIDED] if GUIDED in graphs else graphs[MODEL]


def ending(last: Step, decode: Decoder | None) -> Iterator[Step]:
    """The last step with its results; values that are not finite would be shown as black pictures."""
    latents = last.state.astype(np.float32)  # as decoders take them: float64 holds what is infinite there
    if not np.isfinite(latents).all():
        yield last
        raise GateError(
            "it made values that are not finite",
            hint="if its precision overflows, build it with --bf16, --fp32, or more --island",
        )
    if decode is None:
        yield Step(last.index, last.time, last.state, {LATENTS: latents})
        return
    try:
        pictures = to_uint8(decode(latents))
    except GateError:
        yield Step(last.index, last.time, last.state, {LATENTS: latents})
        raise
    if len(pictures) != len(latents):
        raise InputError(
            f"the decoder made {len(pictures)} pictures of {len(latents)} latents", hint="build the decoder again"
        )
    yield Step(last.index, last.time, last.state, {LATENTS: latents, PICTURES: pictures})


def _port(graphs: Mapping[str, Graph], role: str) -> Port:
    return input_of(graph_of(graphs), role)


def input_of(graph: Graph, role: str) -> Port:
    port = graph.input(role)
    if port is None:
        names = ", ".join(port.name for port in graph.inputs)
        raise UsageError(f"none of the inputs {names} is a {role}", hint="declare the role of each input")
    return port


def output_of(graph: Graph, role: str) -> Port:
    port = graph.output(role)
    if port is None:
        names = ", ".join(port.name for port in graph.outputs)
        raise UsageError(f"none of the outputs {names} is a {role}", hint="declare the role of each output")
    return port


def check_port(port: Port, dtype: str, rank: int) -> None:
    if port.dtype != dtype or len(port.shape) != rank or port.shape[0] != BATCH:
        raise UsageError(
            f"{port.name} is {port.dtype} {list(port.shape)}, and a {port.role} is {dtype} of {rank} dimensions, the "
            f"first of which is {BATCH}",
            hint="declare what the network takes and returns",
        )
