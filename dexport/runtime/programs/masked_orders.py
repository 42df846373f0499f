"""Orders in which the places of a picture are decided: what a masked generator does from step to step.

An order is a generator. It yields the ids (B, N) after each step, and goes on from those that it is sent in their
place, if any. So a step can be judged at another run's state, as trajectory parity does. It evaluates the network by
:class:`Transformer`, takes its settings from the program, and random numbers from draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from dexport import limits
from dexport.contract import DROP, LABEL, LOGITS, MEMORY, POSITIONS, STATE, Graph, Scale
from dexport.errors import GateError
from dexport.runtime.draws import Draws, choose
from dexport.runtime.guidance import UNGUIDED
from dexport.runtime.programs.masked_schedules import confidence_counts, halton_counts, halton_order, ramp
from dexport.runtime.programs.program import Network

Ids = Generator[np.ndarray, np.ndarray | None, None]
Temperature = Annotated[float, Meta(ge=0, le=limits.LARGEST_SCALE)]
MODEL, FULL, LIGHT = "model", "full", "light"
"""Graphs of the transformer: a pass over all places; the same with memories; a pass over some places, of memories."""
EMPTY = -1
"""The position of a place of a light pass that holds nothing."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """How places are decided: the facts of a masked generator that its order reads.

    Attributes:
        codes: of the codebook; ids from there on, such as the mask's, become the last one in the end.
        mask: the id of what is not known yet.
        order: name of one of :data:`OWN_RULES`.
        steps: evaluations.
        cfg_scale: s of the guidance null + s * (conditional - null); 1 is none. The official w is s - 1.
        cfg_rule: ``constant``; ``linear`` in the step, or in the ``share`` of known places, from ``cfg_start`` to
            ``cfg_scale``; empty for the order's own.
        temperature: logits are MULTIPLIED by it, so that more is less random.
        temperature_start: where it begins; None where it is the same in every step.
        temperature_power: of the values in between.
        warmup: steps at the beginning that take half the temperature.
        top_k: ids that are drawn from, the most likely ones; 0 for all.
        sampling_temperature: of the order ``maskgit-r``: logits are DIVIDED by it in the end, and by 1 at first.
        choice_temperature: of the noise in the choice of places by confidence.
        schedule: name in :data:`~dexport.runtime.programs.masked_schedules.SHARES`, where the order has several.
        roll: whether every picture begins at another place of a fixed order.
        recap: ``PRE_FULL:NUM_CACHE``: after so many steps, each full pass is followed by so many light ones
            (:mod:`~dexport.runtime.programs.recap`); empty for full passes only.
    """

    codes: Annotated[int, Meta(ge=1, le=limits.LARGEST_STATE)]
    mask: Annotated[int, Meta(ge=0, le=limits.LARGEST_LABEL)]
    order: Literal["halton", "confidence", "mage", "maskgit-r"]
    steps: Annotated[int, Meta(ge=1, le=limits.MOST_STEPS)]
    cfg_scale: Scale = UNGUIDED
    cfg_start: Scale = UNGUIDED
    cfg_rule: Literal["", "constant", "linear", "share"] = ""
    temperature: Temperature = 1.0
    temperature_start: Temperature | None = None
    temperature_power: Annotated[float, Meta(ge=0, le=limits.LARGEST_POWER)] = 1.0
    warmup: Annotated[int, Meta(ge=0, le=limits.MOST_STEPS)] = 0
    top_k: Annotated[int, Meta(ge=0, le=limits.LARGEST_STATE)] = 0
    sampling_temperature: Annotated[float, Meta(gt=0, le=limits.LARGEST_SCALE)] = 1.0
    choice_temperature: Temperature = 4.5
    schedule: Literal["root", "linear", "square", "cosine", "arccos"] = "arccos"
    roll: bool = False
    recap: str = ""

    def scale_at(self, step: int, known: float) -> float:
        """The scale of the guidance in a step, after which this share of the places is known."""
        start, scale = self.cfg_start, self.cfg_scale
        if scale == UNGUIDED:
            return scale
        match self.cfg_rule or OWN_RULES[self.order]:
            case "linear":
                return start + (scale - start) * step / max(1, self.steps - 1)
            case "share":
                return start + (scale - start) * known
        return scale

    def temperatures(self) -> np.ndarray:
        """Of every step (steps,) float32."""
        start = self.temperature if self.temperature_start is None else self.temperature_start
        values = ramp(start, self.temperature, self.steps) ** np.float32(self.temperature_power)
        values[: self.warmup] *= np.float32(0.5)
        return values


@dataclass(frozen=True, eq=False)
class Prediction:
    """Logits of all places, guided where they are asked for, as all of them at once are large.

    Attributes:
        conditional, null: (B, N, V) float32; null is None without guidance.
        scale: s of null + s * (conditional - null).
        memories: what the graph leaves for others, by name; both halves of a guided batch, the conditional one first.
    """

    conditional: np.ndarray
    null: np.ndarray | None
    scale: float
    memories: Mapping[str, np.ndarray]

    def of(self, image: int, places: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Logits (places, V) float32 of one image.

        Raises:
            GateError: they are not finite.
        """
        logits = self.conditional[image, places]
        if self.null is not None:
            scale = np.float32(self.scale)
            logits = scale * logits - np.float32(self.scale - UNGUIDED) * self.null[image, places]
        if not np.isfinite(logits).all():
            raise GateError(
                "it made logits that are not finite",
                hint="if its precision overflows, build it with --bf16, --fp32, or more --island",
            )
        return logits

    def at(self, places: np.ndarray) -> Prediction:
        """The logits of some places (B, n) of each picture."""
        index = places[..., None]
        null = None if self.null is None else np.take_along_axis(self.null, index, axis=1)
        return Prediction(np.take_along_axis(self.conditional, index, axis=1), null, self.scale, {})


class Transformer:
    """The network of a masked generator, evaluated for ids, with guidance around it.

    Args:
        graph: the one that is evaluated where no other one is named.
        count: B, pictures.
        labels: (B,); empty where it takes none.
        null: the label of the unconditional prediction; None where there is none.
        prefix: ids that the network takes before those of the places, and whose logits nobody reads.
    """

    def __init__(
        self,
        network: Network,
        graph: str,
        count: int,
        labels: Sequence[int],
        null: int | None,
        prefix: Sequence[int] = (),
    ) -> None:
        self.network, self.graph, self.count = network, graph, count
        self.labels, self.null = np.array(labels, np.int64), null
        self.prefix = np.tile(np.array(prefix, np.int64), (count, 1))

    def __call__(
        self, scale: float, ids: np.ndarray, graph: str = "", *, guided: bool | None = None, **more: np.ndarray
    ) -> Prediction:
        """Evaluate a graph.

        Args:
            scale: of the guidance; 1 is none, and the batch is not doubled.
            ids: (B, n) int64.
            guided: whether the batch is doubled, whatever the scale is.
            more: other inputs by name, such as memories; for both halves of a guided batch, the conditional one first.
        """
        graph = graph or self.graph
        ports, guided = self.network.graphs[graph], scale != UNGUIDED if guided is None else guided
        ids = np.concatenate([self.prefix, ids], axis=1)
        both = np.concatenate([ids, ids]) if guided else ids
        given = {**self._labels(ports, guided), **more}
        state = next(port for port in ports.inputs if port.role == STATE)
        given[state.name] = both.reshape(state.dims(len(both)))
        outputs = self.network(graph, **given)
        logits = next(outputs[port.name] for port in ports.outputs if port.role == LOGITS)[:, self.prefix.shape[1] :]
        kept = {port.name: outputs[port.name] for port in ports.outputs if port.role == MEMORY}
        conditional, null = (logits[: len(ids)], logits[len(ids) :]) if guided else (logits, None)
        return Prediction(conditional, null, scale, kept)

    def light(self, scale: float, ids: np.ndarray, positions: np.ndarray, full: Prediction) -> Prediction:
        """Logits of some places (B, n), beside the others as a full pass left them.

        Args:
            ids, positions: (B, n) int64; what they lack to the size of the graph is filled up.
        """
        port = next(port for port in self.network.graphs[LIGHT].inputs if port.role == POSITIONS)
        (_, size), n, guided = port.dims(self.count), ids.shape[1], full.null is not None
        missing = ((0, 0), (0, size - n))
        places = np.pad(positions, missing, constant_values=EMPTY)
        more = {**full.memories, port.name: np.concatenate([places, places]) if guided else places}
        found = self(scale, np.pad(ids, missing), LIGHT, guided=guided, **more)
        null = None if found.null is None else found.null[:, :n]
        return Prediction(found.conditional[:, :n], null, scale, {})

    def _labels(self, ports: Graph, guided: bool) -> dict[str, np.ndarray]:
        """The labels, and which of them are dropped; the second half of a guided batch has the null label."""
        label, drop = ports.input(LABEL), ports.input(DROP)
        given = dict[str, np.ndarray]()
        if drop is not None:
            given[drop.name] = np.repeat([False, True], self.count) if guided else np.zeros(self.count, bool)
        if label is not None:
            null = self.labels if drop is not None else np.full_like(self.labels, self.null or 0)
            labels = np.concatenate([self.labels, null]) if guided else self.labels
            given[label.name] = labels.reshape(label.dims(len(labels)))
        return given


def go_on(ids: np.ndarray) -> Generator[np.ndarray, np.ndarray | None, np.ndarray]:
    """Yield the ids after a step, and return those to go on from."""
    told = yield ids.copy()
    return ids if told is None else told.copy()


def probabilities(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0) -> np.ndarray:
    """Softmax over the last axis: float64 of logits that are MULTIPLIED by the temperature.

    Args:
        top_k: how many are kept, the most likely ones, and more where several are equally likely; 0 for all.
    """
    scaled = (logits * np.float32(temperature)).astype(np.float64)
    if 0 < top_k < scaled.shape[-1]:
        least = np.partition(scaled, -top_k, axis=-1)[..., -top_k, None]
        scaled[scaled < least] = -np.inf
    scaled -= scaled.max(axis=-1, keepdims=True)
    np.exp(scaled, out=scaled)
    return scaled / scaled.sum(axis=-1, keepdims=True)


def halton(settings: Decisions, transformer: Transformer, grid: tuple[int, int], draws: Draws) -> Ids:
    """A fixed order that spreads over the picture, Halton points; with ``roll`` each picture begins elsewhere in it.

    Draws per step: a choice (B, N) of every place, of which those of the step are used. Source: ``HaltonSampler``.
    """
    places, batch = math.prod(grid), transformer.count
    order = np.tile(halton_order(*grid), (batch, 1))
    if settings.roll:
        shifts = draws.categorical(np.full((batch, places), 1 / places))
        order = np.stack([np.roll(row, shift) for row, shift in zip(order, shifts, strict=True)])
    ids, known = np.full((batch, places), settings.mask, np.int64), 0
    temperature = settings.temperatures()
    for step, count in enumerate(halton_counts(settings.steps, places)):
        prediction = transformer(settings.scale_at(step, count / places), ids)
        numbers = draws.choices(ids.shape)
        for image, row in enumerate(order):
            some = row[known:count]
            likely = probabilities(prediction.of(image, some), temperature[step], settings.top_k)
            ids[image, some] = choose(numbers[image, some], likely)
        known = count
        ids = yield from go_on(ids)


def confidence(settings: Decisions, transformer: Transformer, grid: tuple[int, int], draws: Draws) -> Ids:
    """The places whose drawn ids are most likely come first, with noise that fades.

    What is known is drawn anew in every step, and may become the mask again: so does the official code.
    Draws per step: a choice and a Gumbel number (B, N) of every place. Source: ``ConfidenceSampler``.
    """
    places, batch, last = math.prod(grid), transformer.count, max(1, settings.steps - 1)
    ids = np.full((batch, places), settings.mask, np.int64)
    temperature = settings.temperatures()
    for step, count in enumerate(confidence_counts(settings.schedule, settings.steps, places)):
        prediction = transformer(settings.scale_at(step, count / places), ids)
        numbers, noise = draws.choices(ids.shape), draws.gumbel(ids.shape)
        for image in range(batch):
            likely = probabilities(prediction.of(image), temperature[step], settings.top_k)
            chosen = choose(numbers[image], likely)
            with np.errstate(divide="ignore"):  # what cannot be is never chosen, but by a recording
                sure = np.log(np.take_along_axis(likely, chosen[:, None], axis=-1)[:, 0])
            sure = sure + settings.choice_temperature * noise[image] * (1 - step / last)
            sure[ids[image] != settings.mask] = np.inf
            decided = sure >= np.partition(sure, -count)[-count]
            ids[image, decided] = chosen[decided]
        ids = yield from go_on(ids)


Run = Callable[[Decisions, Transformer, tuple[int, int], Draws], Ids]
"""``(settings, transformer, (height, width), draws)`` to the ids after each step, as many as there are steps."""
PLACE_BY_PLACE: Mapping[str, Run] = {"halton": halton, "confidence": confidence}
"""Orders by name."""
OWN_RULES = {"halton": "constant", "confidence": "linear", "mage": "linear", "maskgit-r": "linear"}
"""The rule of the guidance where the program does not say one, by order."""
