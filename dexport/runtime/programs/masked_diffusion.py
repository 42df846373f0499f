"""Masked diffusion: continuous tokens in a random order, a few at a time, each by a small diffusion of its own (MAR).

The role ``transformer`` is one network with the graphs

- ``model``: tokens, mask, labels -> the condition of every token;
- ``full``: the same, and memories for ``light``;
- ``light``: tokens, mask, labels, positions and the memories -> the conditions of a group (ReCAP, arXiv 2505.19089);
- ``diffloss``: some guided steps of the inner diffusion of a token.

The role ``decoder`` is optional: without it, latents are the result. Source of the loops: ``sample_tokens`` of
LTH14/mar ``models/mar.py`` at fe470ac, and of liebenxj/ReCAP ``examples/MAR+ReCAP/models/mar.py`` at 4d1da38 for
``recap``.

Draws, in order: one permutation of all tokens, whose last ones come first; then for each step normal numbers
(B, steps of the inner diffusion, tokens of this step in ascending position, channels), the first of which it starts
from, while the others are the noise of every inner step but the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta
from msgspec.structs import replace

from dexport import limits
from dexport.contract import (
    CONDITION,
    LABEL,
    MASK,
    MEMORY,
    NOISE,
    POSITIONS,
    PREDICTION,
    SCALE,
    STATE,
    TIME,
    WEIGHTS,
    Clock,
    Decoding,
    Graph,
    Port,
    Scale,
)
from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import UNGUIDED
from dexport.runtime.programs.ending import MODEL, check_decoding, decoder_of, ending, player_of, results_of
from dexport.runtime.programs.ports import check_fed, check_port, input_of, output_of
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
from dexport.runtime.programs.recap import groups_of, recap_of
from dexport.runtime.schedule import Schedule, cosine_betas, timesteps_of

FULL, LIGHT, DIFFLOSS = "full", "light", "diffloss"
LIGHT_SHARE = 0.4
"""Of the inner steps of a full pass, where nothing else is said: what the scripts of ReCAP take."""


@dataclass(frozen=True)
class Turn:
    """Some tokens that are decoded together.

    Attributes:
        count: how many.
        masked: tokens with a mask after it, as the guidance counts them.
    """

    count: int
    masked: int


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Program):
    """Facts of a generator of continuous tokens.

    Attributes:
        steps: in which all tokens are decoded.
        cfg_scale: of the guidance; 1 is none.
        cfg_schedule: whether it is the same in every step, or grows with the share of decoded tokens.
        temperature: of the noise that the inner diffusion adds.
        respacing: of the inner diffusion; see :func:`dexport.runtime.schedule.timesteps_of`.
        recap: ``PRE_FULL:NUM_CACHE``: after so many steps, each full pass is followed by so many light ones; empty for
            full passes only.
        light_respacing: that of light passes; empty for two fifths as many steps.
        patch: side of a token in cells of the latent.
        decoding: how latents become pictures.
    """

    kind: ClassVar[str] = "masked-diffusion"
    roles: ClassVar[Mapping[str, Role]] = {
        "transformer": Role(graphs=(frozenset({MODEL, DIFFLOSS}), frozenset({FULL, DIFFLOSS}))),
        "decoder": Role(least=0),
    }
    settings: ClassVar[tuple[str, ...]] = (
        "steps",
        "cfg_scale",
        "cfg_schedule",
        "temperature",
        "respacing",
        "recap",
        "light_respacing",
    )

    steps: Annotated[int, Meta(ge=1, le=limits.MOST_STEPS)]
    cfg_scale: Scale = UNGUIDED
    cfg_schedule: Literal["linear", "constant"] = "linear"
    temperature: Annotated[float, Meta(ge=0, le=limits.LARGEST_SCALE)] = 1.0
    respacing: str | int = "100"
    recap: str = ""
    light_respacing: str | int = ""
    patch: Annotated[int, Meta(ge=1, le=limits.LARGEST_SHUFFLE)] = 1
    decoding: Decoding = Decoding("network")  # noqa: RUF009 - it cannot be changed

    def __post_init__(self) -> None:
        _ = self.inner, self.light_inner
        if self.recap:
            recap_of(self.recap)
        if self.condition.kind != "class" or self.condition.null is None:
            raise UsageError("there are no classes, or no null label", hint="declare both in the condition")

    @property
    def title(self) -> str:
        guidance = "" if self.cfg_scale == UNGUIDED else f", cfg {self.cfg_scale:g} {self.cfg_schedule}"
        cached = f", recap {self.recap}" if self.recap else ""
        return f"{self.steps} steps of {self.respacing} inner ones{guidance}{cached}"

    @property
    def clock(self) -> Clock:
        """The share of tokens that have a mask."""
        return Clock(0.0, 1.0)

    @property
    def inner(self) -> Inner:
        """The diffusion of a token in a full pass."""
        return Inner.of(str(self.respacing), self.temperature)

    @property
    def light_inner(self) -> Inner:
        """The same in a light pass."""
        steps = max(2, int(self.inner.steps * LIGHT_SHARE))
        return Inner.of(str(self.light_respacing or steps), self.temperature)

    def plan(self, length: int) -> list[list[Turn]]:
        """Groups of turns, of so many tokens: the first turn of each is a full pass, the others are light ones."""
        if self.recap:
            return recap_plan(length, self.steps, self.recap)
        return plain_plan(length, self.steps)

    def run(self, calls: Calls, request: Request, draws: Draws) -> Iterator[Step]:
        """States (B, C, H, W); results: ``latents`` float32, and ``pictures`` where there is a decoder."""
        check_condition(self.condition, request)
        transformer = _Transformer(calls["transformer"][0], self, request)
        order = draws.permutation(transformer.length)
        left, index, before = transformer.length, 0, None
        for group in self.plan(transformer.length):
            first = left - sum(turn.count for turn in group)
            positions = np.sort(order[:, first:left], axis=1)
            for number, turn in enumerate(group):
                transformer.decode(positions, group, number, draws)
                if before is not None:
                    yield before
                left -= turn.count
                before = Step(index, left / transformer.length, self._latents(transformer.tokens))
                index += 1
        assert before is not None, "there is at least one step"
        yield from ending(before, decoder_of(calls, self.decoding))

    def players(self) -> Mapping[str, str]:
        return player_of(self.decoding)

    def makes(self, networks: Graphs) -> Mapping[str, tuple[int, ...]]:
        return results_of(self.decoding, networks, self._shape(networks["transformer"][0]))

    def smallest(self, networks: Graphs) -> Graphs:
        thin = {STATE: self.patch**2, NOISE: self.patch**2, PREDICTION: self.patch**2, CONDITION: 1}

        def small(port: Port) -> Port:
            if port.role == MEMORY:
                return replace(port, shape=(port.shape[0], *[1] * (len(port.shape) - 1)))
            return replace(port, shape=(*port.shape[:-1], thin[port.role])) if port.role in thin else port

        def smaller(graph: Graph) -> Graph:
            return Graph(tuple(map(small, graph.inputs)), tuple(map(small, graph.outputs)))

        transformers = [{name: smaller(graph) for name, graph in graphs.items()} for graphs in networks["transformer"]]
        return {**networks, "transformer": transformers}

    def check(self, networks: Graphs) -> None:
        super().check(networks)
        graphs = networks["transformer"][0]
        for name, known in INPUTS.items():
            if name in graphs:
                _check_graph(name, graphs[name], known)
        length, channels = (int(size) for size in input_of(_whole(graphs), STATE).shape[1:])
        side = math.isqrt(length)
        if side * side != length or channels % self.patch**2:
            raise UsageError(
                f"{length} tokens of {channels} channels are no square of patches of {self.patch}x{self.patch}",
                hint="let the program's patch be the network's",
            )
        if self.steps > length:
            raise UsageError(
                f"{self.steps} steps are more than there are tokens, {length}", hint=f"give {length} or fewer"
            )
        self._check_recap(graphs, length)
        check_decoding(self.decoding, networks, self._shape(graphs))

    def _check_recap(self, graphs: Mapping[str, Graph], length: int) -> None:
        if not self.recap:
            return
        if not {FULL, LIGHT} <= set(graphs):
            raise UsageError(
                f"recap needs the graphs {FULL} and {LIGHT}, and there are {', '.join(graphs)}",
                hint=f"build it with --graph {FULL} --graph {LIGHT} --graph {DIFFLOSS}, or leave out --recap",
            )
        most = int(input_of(graphs[LIGHT], POSITIONS).shape[1])
        largest = max((sum(turn.count for turn in group) for group in self.plan(length) if len(group) > 1), default=0)
        if largest > most:
            raise UsageError(
                f"these settings decode groups of {largest} tokens, and the graph {LIGHT} takes {most}",
                hint=f"take more steps, or build it with --set light_tokens={largest}",
            )

    def _shape(self, graphs: Mapping[str, Graph]) -> tuple[int, int, int]:
        """Of a latent (C, H, W)."""
        length, channels = (int(size) for size in input_of(_whole(graphs), STATE).shape[1:])
        side = math.isqrt(length) * self.patch
        return channels // self.patch**2, side, side

    def _latents(self, tokens: np.ndarray) -> np.ndarray:
        """(B, L, C) in the order (C, row, column) inside a token -> (B, C / patch², H, W)."""
        side, patch = math.isqrt(tokens.shape[1]), self.patch
        cells = tokens.reshape(len(tokens), side, side, -1, patch, patch).transpose(0, 3, 1, 4, 2, 5)
        return cells.reshape(len(tokens), -1, side * patch, side * patch).copy()

    def scale_of(self, turn: Turn, length: int) -> float:
        """The guidance of a turn."""
        if self.cfg_schedule == "constant":
            return self.cfg_scale
        return 1 + (self.cfg_scale - 1) * (length - turn.masked) / length


@dataclass(frozen=True, eq=False)
class Inner:
    """The diffusion of a token.

    Attributes:
        times: (steps,) float32, original timesteps, noisiest first.
        weights: (steps, 5) float32: of x and of the predicted noise in the mean; the logarithm of the standard
            deviation at a variance of 0, and its slope; of the noise.
    """

    times: np.ndarray
    weights: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.times)

    @classmethod
    def of(cls, respacing: str, temperature: float) -> Inner:
        """Cosine betas, 1000 steps, a learned variance between beta and the posterior's; no noise at the last step."""
        whole = Schedule.of_betas(cosine_betas())
        kept = whole.keeping(timesteps_of(whole.steps, respacing))
        of_start, of_x = kept.posterior_mean_coef1, kept.posterior_mean_coef2
        signal, noise = np.sqrt(1 / kept.alphas_cumprod), np.sqrt(1 / kept.alphas_cumprod - 1)
        low, high = kept.posterior_log_variance_clipped, np.log(kept.betas)
        added = np.full(kept.steps, temperature)
        added[0] = 0.0
        columns = (of_start * signal + of_x, -of_start * noise, (high + low) / 4, (high - low) / 4, added)
        weights = np.stack(columns, axis=1)[::-1].astype(np.float32)
        return cls(kept.timestep_map[::-1].astype(np.float32), weights)

    def in_parts(self, size: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Steps, times and weights, so many at a time; what fills up the last part changes nothing."""
        missing = -self.steps % size
        times = np.append(self.times, np.zeros(missing, np.float32))
        nothing = np.tile(np.array([[1, 0, 0, 0, 0]], np.float32), (missing, 1))
        weights = np.concatenate([self.weights, nothing])
        for start in range(0, len(times), size):
            part = slice(start, start + size)
            yield part, times[part], weights[part]


class _Transformer:
    """The network of a run, and the tokens so far.

    Attributes:
        tokens, mask: (B, L, C) and (B, L) float32, 1 where a token is not known.
    """

    def __init__(self, network: Network, program: MaskedDiffusion, request: Request) -> None:
        self._network, self._program = network, program
        self._guided = program.cfg_scale != UNGUIDED
        self.length, channels = (int(size) for size in input_of(_whole(network.graphs), STATE).shape[1:])
        self.tokens = np.zeros((request.count, self.length, channels), np.float32)
        self.mask = np.ones((request.count, self.length), np.float32)
        labels = np.array(request.labels, np.int64)
        null = np.full_like(labels, program.condition.null or 0)
        self._labels = np.concatenate([labels, null]) if self._guided else labels
        self._inner = program.inner, program.light_inner
        self._memories: dict[str, np.ndarray] = {}

    def decode(self, positions: np.ndarray, group: Sequence[Turn], number: int, draws: Draws) -> None:
        """Decode the tokens of one turn of a group, which come in ascending position.

        Args:
            positions: (B, G), of the whole group.
        """
        count = group[number].count
        start = sum(turn.count for turn in group[:number])
        places = positions[:, start : start + count]
        if number == 0:
            z = self._full(keep=len(group) > 1)
            z = np.take_along_axis(z, self._twice(places)[:, :, None], axis=1)
        elif count:
            z = self._light(positions)[:, start : start + count]
        if not count:
            return
        scale = self._program.scale_of(group[number], self.length)
        sampled = self._sample(z, scale, self._inner[number > 0], draws)
        np.put_along_axis(self.tokens, places[:, :, None], sampled, axis=1)
        np.put_along_axis(self.mask, places, np.float32(0), axis=1)

    def _full(self, keep: bool) -> np.ndarray:
        name = FULL if keep or MODEL not in self._network.graphs else MODEL
        graph = self._network.graphs[name]
        outputs = self._network(name, **_named(graph, self._given))
        self._memories = {port.name: outputs[port.name] for port in graph.outputs if keep and port.role == MEMORY}
        return outputs[output_of(graph, CONDITION).name]

    def _light(self, positions: np.ndarray) -> np.ndarray:
        graph = self._network.graphs[LIGHT]
        most = int(input_of(graph, POSITIONS).shape[1])
        padding = np.full((len(positions), most - positions.shape[1]), self.length, np.int64)
        given = {**self._given, POSITIONS: self._twice(np.concatenate([positions, padding], axis=1))}
        outputs = self._network(LIGHT, **_named(graph, given), **self._memories)
        return outputs[output_of(graph, CONDITION).name]

    @property
    def _given(self) -> dict[str, np.ndarray]:
        return {STATE: self._twice(self.tokens), MASK: self._twice(self.mask), LABEL: self._labels}

    def _twice(self, rows: np.ndarray) -> np.ndarray:
        """The rows for the conditional and the unconditional half."""
        return np.concatenate([rows, rows]) if self._guided else rows

    def _sample(self, z: np.ndarray, scale: float, inner: Inner, draws: Draws) -> np.ndarray:
        """z (B or 2B, count, D) -> tokens (B, count, C)."""
        batch, _, channels = self.tokens.shape
        count = z.shape[1]
        noise = draws.normal((batch, inner.steps, count, channels)).transpose(0, 2, 1, 3)
        both = np.stack([z[:batch], z[-batch:]], axis=2)
        sampled = denoised(
            self._network, inner, noise.reshape(-1, inner.steps, channels), both.reshape(batch * count, 2, -1), scale
        )
        return sampled.reshape(batch, count, channels)


def denoised(network: Network, inner: Inner, noise: np.ndarray, condition: np.ndarray, scale: float) -> np.ndarray:
    """Tokens (rows, C) by the graph ``diffloss``, several steps at a time.

    Args:
        noise: (rows, steps, C): the start, and what is added in every step but the last.
        condition: (rows, 2, D), conditional and unconditional.
        scale: of the guidance.
    """
    graph = network.graphs[DIFFLOSS]
    output, size = output_of(graph, PREDICTION).name, int(input_of(graph, TIME).shape[1])
    rows, steps, channels = noise.shape
    x, later = noise[:, 0], np.zeros((rows, steps + -steps % size, channels), np.float32)
    later[:, : steps - 1] = noise[:, 1:]
    for part, times, weights in inner.in_parts(size):
        given = {
            STATE: x,
            TIME: np.repeat(times[None], rows, axis=0),
            CONDITION: condition,
            SCALE: np.full(rows, scale, np.float32),
            NOISE: later[:, part],
            WEIGHTS: np.repeat(weights[None], rows, axis=0),
        }
        x = network(DIFFLOSS, **_named(graph, given))[output]
    return x


def plain_plan(length: int, steps: int) -> list[list[Turn]]:
    """MAR's own schedule: a cosine of the steps, at least one token in each, the rest in the last."""
    groups, masked = [], length
    for step in range(steps):
        ahead = max(1, min(masked - 1, math.floor(length * np.cos(math.pi / 2.0 * (step + 1) / steps))))
        count = masked if step == steps - 1 else masked - ahead
        groups.append([Turn(count, ahead)])
        masked = ahead
    return groups


def recap_plan(length: int, steps: int, recap: str) -> list[list[Turn]]:
    """ReCAP's schedule: the same cosine, rounded in another order, and in groups."""
    plan, masked = [], length
    for group in groups_of(steps, recap):
        turns = []
        for step in group:
            ahead = max(1, min(masked - 1, math.floor(length * np.cos(math.pi / 2.0 * ((step + 1) / steps)))))
            ahead = 0 if step == steps - 1 else ahead
            turns.append(Turn(masked - ahead, ahead))
            masked = ahead
        plan.append(turns)
    return plan


TRANSFORMER_INPUTS = {STATE: ("float32", 3), MASK: ("float32", 2), LABEL: ("int64", 1)}
INPUTS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    MODEL: TRANSFORMER_INPUTS,
    FULL: TRANSFORMER_INPUTS,
    LIGHT: {**TRANSFORMER_INPUTS, POSITIONS: ("int64", 2)},
    DIFFLOSS: {
        STATE: ("float32", 2),
        TIME: ("float32", 2),
        CONDITION: ("float32", 3),
        SCALE: ("float32", 1),
        NOISE: ("float32", 3),
        WEIGHTS: ("float32", 3),
    },
}
"""What each graph takes, by role: dtype and dimensions. Memories are matched by name."""


def _check_graph(name: str, graph: Graph, known: Mapping[str, tuple[str, int]]) -> None:
    for role, (dtype, rank) in known.items():
        check_port(input_of(graph, role), dtype, rank)
    output_of(graph, PREDICTION if name == DIFFLOSS else CONDITION)
    roles = (*known, *([MEMORY] if name == LIGHT else []))
    check_fed(graph, [port for port in graph.inputs if port.role in roles])


def _whole(graphs: Mapping[str, Graph]) -> Graph:
    """A graph that takes all tokens."""
    return graphs[MODEL] if MODEL in graphs else graphs[FULL]


def _named(graph: Graph, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values by the names of the ports that have these roles."""
    return {port.name: given[port.role] for port in graph.inputs if port.role in given}
