"""The types that a manifest is made of: ports, graphs and the facts of programs; JSON both ways.

Meaning comes from the role of a port, never from its position or its name. Sizes are bounded here, where a manifest is
read, before anything is allocated.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from dexport import limits
from dexport.errors import InputError
from dexport.printable import printable

BATCH = "B"
"""Name of the symbolic batch dimension."""
STATE, TIME, LABEL, SCALE, MEMORY = "state", "time", "label", "scale", "memory"
"""Roles of inputs; a memory is an output of one graph and an input of another, matched by name."""
DROP = "drop"
"""Role of an input (B,) bool: rows whose label counts as the null label."""
PREDICTION, LOGITS, GRADIENT, LATENT, PICTURE = "prediction", "logits", "gradient", "latent", "picture"
"""Roles of outputs; latents and pictures are inputs as well: a decoder takes one and gives the other."""
MASK, POSITIONS, CONDITION, NOISE, WEIGHTS = "mask", "positions", "condition", "noise", "weights"
"""Roles around tokens: which are not known, the places of a group (-1 where it has none); what an inner diffusion is
asked by, which one graph gives and another takes, its noise, and the coefficients of its steps."""

T = TypeVar("T")
Size = Annotated[int, Meta(ge=0, le=limits.LARGEST_STATE)]
Number = Annotated[float, Meta(ge=-limits.LARGEST_SETTING, le=limits.LARGEST_SETTING)]
Share = Annotated[float, Meta(ge=0, le=1)]
Dtype = Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"]
"""Of a port, as numpy names it."""
Name = Annotated[str, Meta(min_length=1, max_length=1024)]
Label = Annotated[int, Meta(ge=-limits.LARGEST_LABEL, le=limits.LARGEST_LABEL)]
Scale = Annotated[float, Meta(ge=1, le=limits.LARGEST_SCALE)]


class Clock(Struct, frozen=True):
    """A unit of time: its values at the clean and at the noisy end of a trajectory."""

    clean: Number
    noisy: Number


TIMESTEPS = Clock(0.0, 1000.0)
"""Original timesteps of the systems that are trained with 1000 of them."""


class Port(Struct, frozen=True, omit_defaults=True):
    """One input or output of a graph.

    Attributes:
        shape: integers; the first may be ``"B"``, the symbolic batch.
        role: what it means to a program; empty for ports that none knows.
        range: ends of the integers that an input takes by which the graph indexes a table, both included.
        choices: times of a table, of which a graph takes no others.
        clock: the unit of a time, where it is not its program's.
    """

    name: Name
    dtype: Dtype
    shape: Annotated[tuple[Size | Literal["B"], ...], Meta(max_length=limits.MOST_DIMENSIONS)]
    role: str = ""
    range: tuple[Label, Label] | None = None
    choices: Annotated[tuple[Number, ...], Meta(max_length=2 * limits.MOST_STEPS)] = ()
    clock: Clock | None = None

    def __post_init__(self) -> None:
        if BATCH in self.shape[1:]:
            raise ValueError(f"{printable(self.name)}: only the first dimension may be the batch")

    def dims(self, rows: int) -> tuple[int, ...]:
        """The shape with the batch filled in."""
        return tuple(rows if size == BATCH else int(size) for size in self.shape)


class Graph(Struct, frozen=True):
    """An entry point of a network: its ports, in the order of the ONNX file."""

    inputs: Annotated[tuple[Port, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[Port, ...], Meta(min_length=1)]

    def input(self, role: str) -> Port | None:
        """The input that has a role; None where there is none."""
        return next((port for port in self.inputs if port.role == role), None)

    def output(self, role: str) -> Port | None:
        """The output that has a role; None where there is none."""
        return next((port for port in self.outputs if port.role == role), None)


class Batch(Struct, frozen=True):
    """The batches that a network was built for; engines take no others."""

    min: Annotated[int, Meta(ge=1, le=limits.MOST_BATCH)]
    opt: Annotated[int, Meta(ge=1, le=limits.MOST_BATCH)]
    max: Annotated[int, Meta(ge=1, le=limits.MOST_BATCH)]


class Fingerprint(Struct, frozen=True):
    """What an engine was built for: input name -> its least, best and largest shape."""

    shapes: dict[str, tuple[tuple[Size, ...], tuple[Size, ...], tuple[Size, ...]]]


class Engine(Struct, frozen=True):
    """What is asked of an engine before it is deserialized.

    Attributes:
        flavour, version: of the TensorRT that built it.
        targets: compute capabilities, such as ``sm89``.
    """

    file: Name
    flavour: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    targets: tuple[str, ...]
    fingerprint: Fingerprint


class CustomOp(Struct, frozen=True):
    """A custom op of a graph; hashes of the kernels that an engine embeds, else none."""

    ptx_sha256: tuple[str, ...]


class Condition(Struct, frozen=True):
    """What pictures are asked for by.

    Attributes:
        kind: ``class``: a label each; ``image``: a picture each; ``none``: nothing.
        classes: how many there are.
        names: of the classes; empty where there are too many.
        null: the label of the unconditional prediction; None where the network has none.
    """

    kind: Literal["class", "image", "none"] = "none"
    classes: Annotated[int, Meta(ge=1, le=limits.MOST_CLASSES)] | None = None
    names: tuple[str, ...] = ()
    null: Annotated[int, Meta(ge=0, le=limits.LARGEST_LABEL)] | None = None


UNCONDITIONAL = Condition()


class GuidanceRule(Struct, frozen=True):
    """Classifier-free guidance: null + s(t) * (conditional - null).

    Attributes:
        channels: how many channels of the prediction are guided, the rest stays conditional; None for all.
        power: p of s(t) = (scale - 1) * (1 - cos(pi * (1 - t)^p)) / 2 + 1, t from 0 (clean) to 1; None for s = scale.
    """

    channels: Annotated[int, Meta(ge=1, le=limits.MOST_CHANNELS)] | None = None
    power: Annotated[float, Meta(gt=0, le=limits.LARGEST_POWER)] | None = None


class Route(Struct, frozen=True):
    """Which steps a network evaluates: a share of the trajectory, or one turn in several."""

    share: Share | None = None
    every: Annotated[int, Meta(ge=1, le=limits.MOST_STEPS)] | None = None


class Decoding(Struct, frozen=True):
    """How states become pictures.

    Attributes:
        kind: ``none``: they are pictures; ``pixel-shuffle``: channels are pixels; ``network``: the role ``decoder``.
        recipe: the decoder's.
        scale: states are divided by it before they are decoded.
        black: its value in the pictures that the network makes, where white is 1.
        factor, tiles: of the pixel shuffle; see :class:`dexport.runtime.decode.PixelShuffle`.
    """

    kind: Literal["none", "pixel-shuffle", "network"] = "none"
    recipe: str = ""
    scale: Annotated[float, Meta(ge=-limits.LARGEST_LATENT_SCALE, le=limits.LARGEST_LATENT_SCALE)] = 1.0
    black: Annotated[float, Meta(ge=-1, le=0)] = -1.0
    factor: Annotated[int, Meta(ge=1, le=limits.LARGEST_SHUFFLE)] = 1
    tiles: Annotated[int, Meta(ge=1, le=limits.LARGEST_SHUFFLE)] = 1


PIXELS = Decoding()
"""States are pictures already, in [-1, 1]."""


def from_json(kind: type[T], value: Any, where: str) -> T:
    """A value of the contract from JSON values.

    Args:
        where: what it is read from and is called there, for the message.

    Raises:
        InputError: a field is missing, of another type, or out of its bounds; it is named.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{where} is not what dexport writes there: {printable(str(error))}", hint="build the bundle again"
        ) from error


def to_json(value: Any) -> Any:
    """The JSON values of a value of the contract."""
    return msgspec.to_builtins(value)


def graphs_from_json(value: Any, where: str) -> dict[str, Graph]:
    """Graphs by name; fields of a manifest's entries that are not ports are left out."""
    return from_json(dict[str, Graph], value, where)
