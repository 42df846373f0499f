"""How pictures are sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dexport.cli.headings import Decorator, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import BATCH, COUNT, SCALE, SEED, STEPS, parse_numbers
from dexport.errors import UsageError
from dexport.limits import shown


@dataclass(frozen=True)
class Sampling:
    """How trajectories are sampled; None is the system's own.

    Attributes:
        more: other settings of the program, by name.
    """

    steps: int | None
    cfg_scale: float | None
    sampler: str | None
    seed: int
    classes: tuple[int, ...] | None = None
    count: int = 1
    batch: int = 8
    order: str | None = None
    temperature: float | None = None
    recap: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the program, by name; None is its own."""
        return {
            "steps": self.steps,
            "cfg_scale": self.cfg_scale,
            "sampler": self.sampler,
            "order": self.order,
            "temperature": self.temperature,
            "recap": self.recap,
            **self.more,
        }


def _sampling(classes: str | None = None, setting: Sequence[str] = (), **values: Any) -> Sampling:
    labels = None if classes is None else tuple(parse_numbers(classes, "--classes", "0,1", int))
    return Sampling(classes=labels, more=dict(map(_setting, setting)), **values)


def _setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; JSON where the value parses, else the plain word."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(
            f"--setting {shown(text)} is not NAME=VALUE", hint="for example --setting cfg_schedule=constant"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def class_labels(text: str) -> Decorator:
    """``--classes``, with this help."""
    return option("--classes", metavar="N,N", help=text)


pictures = (
    option("--count", type=COUNT, default=1, show_default=True, help="Pictures per class."),
    option("--batch", type=BATCH, default=8, show_default=True, help="Pictures that are made together."),
)


def sampling(*more: Decorator, seed: str = "Seed of the noise.") -> OptionGroup:
    """The options of a command that samples.

    Args:
        more: those that not every such command has, of :func:`class_labels` and :data:`pictures`.
        seed: the help of ``--seed``.
    """
    return OptionGroup(
        "sampling",
        "Sampling",
        _sampling,
        (
            *more,
            option("--steps", type=STEPS, help="Sampling steps. [default: the system's]"),
            option("--cfg", "cfg_scale", type=SCALE, help="Guidance scale, 1 for none. [default: the system's]"),
            option(
                "--sampler", metavar="NAME", help="Such as ddpm or ddim, where the model fits. [default: the system's]"
            ),
            option(
                "--order",
                metavar="NAME",
                help="How a masked generator decides places, such as halton or confidence. [default: the system's]",
            ),
            option(
                "--temperature",
                type=SCALE,
                help="How much a masked generator draws at random, 1 as it was trained. [default: the system's]",
            ),
            option(
                "--recap",
                metavar="FULL:LIGHT",
                help="Of a masked generator with the graph light: after FULL steps, so many light passes follow each "
                "full one, such as 12:1 (ReCAP). [default: none]",
            ),
            option(
                "--setting",
                multiple=True,
                metavar="NAME=VALUE",
                help="Another setting of the program, as in the bundle's manifest; repeatable.",
            ),
            option("--seed", type=SEED, default=0, show_default=True, help=seed),
        ),
    )
