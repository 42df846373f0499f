"""What a recipe declares: everything that dexport knows about one model variant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from dexport.contract import (
    BATCH,
    LABEL,
    LATENT,
    PICTURE,
    PREDICTION,
    SCALE,
    STATE,
    TIME,
    Clock,
    Decoding,
    Graph,
    GuidanceRule,
    Port,
)
from dexport.exporter.gates import GATES
from dexport.exporter.weights.source import Adapter
from dexport.runtime.programs.program import Program

ROLES: Mapping[str, str] = {
    "x": STATE,
    "t": TIME,
    "log_snr": TIME,
    "sigma": TIME,
    "y": LABEL,
    "cfg_scale": SCALE,
    "out": PREDICTION,
    "z": LATENT,
    "image": PICTURE,
}
"""Of ports with the field's usual names, where a recipe does not say the role."""
MODEL = "model"
"""The graph that is the network's ``forward``."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    ``shape`` holds integers, or ``"B"`` for the symbolic batch. ``values`` says what example inputs look like:
    standard normal noise, integers in [low, high], or values stratified over [low, high] along the batch (so that
    the rows of one batch cover the whole schedule); of ``choices`` where a graph takes only those.

    ``largest`` is the largest integer that the graph takes, where it is above ``high``: examples of labels stop before
    the null label.

    ``scores`` is of an output of integers that are chosen as the best of many: the recipe's graph that scores every one
    of them, whose output has this one's shape and one more dimension. Parity compares the scores of what was chosen, so
    that another choice counts as much as it is worse, and a near tie next to nothing.

    ``role`` is what a program knows a port by (:mod:`dexport.contract`); by default that of :data:`ROLES`. ``clock`` is
    the unit of a time, at its clean and at its noisy end, where it is not the sampler's.
    """

    name: str
    dtype: Literal["float32", "int64", "bool"]
    shape: tuple[int | str, ...]
    values: Literal["normal", "integers", "stratified", "constant"] = "normal"
    low: float = 0.0
    high: float = 0.0
    choices: tuple[float, ...] = ()
    largest: int | None = None
    role: str | None = None
    clock: tuple[float, float] | None = None
    scores: str = ""

    @property
    def meaning(self) -> str:
        """Its role; empty where no program knows it."""
        return ROLES.get(self.name, "") if self.role is None else self.role

    @property
    def port(self) -> Port:
        """What a manifest says of it."""
        clock = None if self.clock is None else Clock(*map(float, self.clock))
        choices = tuple(map(float, self.choices))
        shape: Any = self.shape  # integers, or the batch
        return Port(self.name, self.dtype, shape, self.meaning, self.accepted, choices, clock)

    @property
    def accepted(self) -> tuple[int, int] | None:
        """The least and the largest value of an int64 input of ``integers``; None for any other."""
        if self.values != "integers" or self.dtype != "int64":
            return None
        return int(self.low), int(self.high) if self.largest is None else self.largest

    def dims(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch dimension filled in."""
        return tuple(batch if dim == BATCH else int(dim) for dim in self.shape)

    def example(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        """An example array of ``dims(batch)``."""
        dims = self.dims(batch)
        match self.values:
            case "normal":
                return rng.standard_normal(dims).astype(self.dtype)
            case "integers":
                return rng.integers(int(self.low), int(self.high), size=dims, endpoint=True).astype(self.dtype)
            case "stratified" if self.choices:
                rows = np.linspace(0, len(self.choices) - 1, batch).round().astype(int)
                return np.array(self.choices, dtype=self.dtype)[rows]
            case "stratified":
                return np.linspace(self.high, self.low, batch, dtype=self.dtype)
            case "constant":
                return np.full(dims, self.high, dtype=self.dtype)


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, role: str) -> TensorSpec | None:
        """The input that has a role; None where there is none."""
        return next((spec for spec in self.inputs if spec.meaning == role), None)

    @property
    def graph(self) -> Graph:
        """What a manifest says of it."""
        return Graph(tuple(spec.port for spec in self.inputs), tuple(spec.port for spec in self.outputs))

    def example(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Deterministic example inputs by name, with ``batch`` rows."""
        rng = np.random.default_rng(seed)
        return {spec.name: spec.example(batch, rng) for spec in self.inputs}


@dataclass(frozen=True)
class Islands:
    """What stays in float32 when the rest of the graph goes to half precision.

    ``modules`` are glob patterns of module paths (a match includes everything below it), each of which must match;
    ``optional`` are those of modules that only some configurations have; ``ops`` are ONNX operator types.
    """

    modules: tuple[str, ...] = ()
    ops: tuple[str, ...] = ("LayerNormalization", "Softmax", "ReduceMean", "GlobalAveragePool")
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """The system's own classifier-free guidance.

    Attributes:
        rule: which channels are guided and how strongly, or a name of :data:`dexport.runtime.guidance.RULES`; or what
            gives one of these for a configuration.
        null_label: the label of the unconditional prediction for a configuration; raises ``ValueError`` when it has
            none.
        clock: the graph's time input at the clean and at the noisy end.
    """

    rule: str | GuidanceRule | Callable[[Mapping[str, Any]], str | GuidanceRule]
    default_scale: float
    null_label: Callable[[Mapping[str, Any]], int]
    clock: tuple[float, float] = (0.0, 1000.0)


@dataclass(frozen=True)
class Sampling:
    """How a denoiser is sampled: the facts of its program ``diffusion``.

    Attributes:
        schedule, prediction: in words; denoisers that share a trajectory must agree on them.
        sampler: name in ``dexport.runtime.samplers.SAMPLERS``.
        steps: how many the system takes by default.
        latent_scale: latents are divided by this before they are decoded.
        decoder: how states become pictures; or the name of the recipe that decodes them, ``pixel-shuffle-N`` or
            ``pixel-shuffle-N-tiles-M`` (:class:`dexport.runtime.decode.PixelShuffle`), or ``none`` in pixel space.
        class_names: for labels on pictures; empty where there are too many.
    """

    schedule: str
    prediction: str
    sampler: str
    steps: int
    latent_scale: float
    decoder: str | Decoding
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphRecipe:
    """One more entry point of a network; all share one weights file.

    Attributes:
        signature: ``(config, (height, width)) -> Signature`` of the graph.
        wrap: ``(network, config) -> module`` whose forward is the graph, around the network and none of its parts
            anew; its inputs come by position, in the order of the signature.
        path: module path of the operations that it adds around the network; by default they are the network's own.
    """

    signature: Callable[[Mapping[str, Any], tuple[int, int]], Signature]
    wrap: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    path: str = ""


Setting = int | str | Callable[[Mapping[str, Any]], int]
"""A number, the constructor argument that is this number, or a function of the configuration."""


def value_of(setting: Setting, config: Mapping[str, Any]) -> int:
    """The number that a setting means for this configuration."""
    if callable(setting):
        return setting(config)
    return config[setting] if isinstance(setting, str) else setting


DEFAULT_GATES: Mapping[str, float] = {name: limits.relative_l2 for name, limits in GATES.items()}
"""Largest relative L2 of one evaluation, of :data:`dexport.exporter.gates.GATES`."""


@dataclass(frozen=True)
class Recipe:
    """One model variant.

    Attributes:
        name: command-line name, such as ``dico-xl``.
        family: the system, such as ``DiCo``.
        source: repository and commit that the graph follows.
        constructor: builds the module from ``config``; argument names are the official ones.
        config: constructor arguments of this variant.
        signature: ``(config, (height, width)) -> Signature`` of the graph ``model``, which is the network's forward.
        graphs: other graphs by name.
        exported: the graphs that a build exports where it is not told which.
        program: ``(config, signatures of the exported graphs by name) -> Program`` of the system that is this network;
            with ``sampling``, that is ``diffusion``.
        latent: default (height, width) of the model's spatial input.
        latent_multiple: height and width must be multiples of this.
        size_argument: constructor argument that fixes the spatial size, if the network has one: the side of a
            square, or ``[height, width]`` where the recipe's own value is such a list.
        size_unit: how much of the size argument a cell of the spatial input is, such as the stride of a VAE.
        pixels_per_latent: image pixels per latent cell along one side (8 for the SD VAE, 1 in pixel space).
        checkpoints: file names of the official weights.
        hub: Hub address of the official weights, ``hf://owner/name/file``, or where else they are.
        adapt: shows a checkpoint as this network's state dict where its files come in other layouts too, or hold more.
        ops: custom ops that the graph uses.
        not_inherited: glob patterns of modules that ``--init-from`` does not take from another model's checkpoint;
            empty where that makes no sense.
        islands, gates: float32 islands, and the largest relative L2 error per precision; ``int8``, ``w8a8``, ``int4``
            and ``ternary`` are those of the least exact scheme of a layer, whatever the rest computes in.
        quantize_exclude: glob patterns of modules that quantisation leaves alone, besides the islands: those that
            little is computed in and much depends on.
    """

    name: str
    family: str
    summary: str
    source: str
    constructor: Callable[..., nn.Module]
    config: Mapping[str, Any]
    signature: Callable[[Mapping[str, Any], tuple[int, int]], Signature]
    latent: tuple[int, int]
    sampling: Sampling | None = None
    guidance: Guidance | None = None
    graphs: Mapping[str, GraphRecipe] = field(default_factory=dict)
    exported: tuple[str, ...] = (MODEL,)
    program: Callable[[Mapping[str, Any], Mapping[str, Signature]], Program] | None = None
    latent_multiple: Setting = 1
    size_argument: str | None = None
    size_unit: Setting = 1
    pixels_per_latent: Setting = 8
    checkpoints: tuple[str, ...] = ()
    hub: str = ""
    adapt: Adapter | None = None
    ops: tuple[str, ...] = ()
    not_inherited: tuple[str, ...] = ()
    islands: Islands = field(default_factory=Islands)
    quantize_exclude: tuple[str, ...] = ()
    gates: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_GATES))

    @property
    def has_program(self) -> bool:
        """Whether the network by itself is a system that runs."""
        return self.program is not None or self.sampling is not None


def settings_of(constructor: Callable[..., nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the constructor's defaults filled in."""
    defaults = {name: p.default for name, p in inspect.signature(constructor).parameters.items()}
    return {**defaults, **config}
