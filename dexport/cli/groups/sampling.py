"""How pictures are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dexport.cli.headings import Decorator, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import BATCH, COUNT, SCALE, SEED, STEPS, parse_numbers


@dataclass(frozen=True)
class Sampling:
    """How trajectories are sampled; None is the system's own."""

    steps: int | None
    cfg_scale: float | None
    sampler: str | None
    seed: int
    classes: tuple[int, ...] | None = None
    count: int = 1
    batch: int = 8

    @property
    def settings(self) -> dict[str, Any]:
        """Of the program, by name; None is its own."""
        return {"steps": self.steps, "cfg_scale": self.cfg_scale, "sampler": self.sampler}


def _sampling(classes: str | None = None, **values: Any) -> Sampling:
    labels = None if classes is None else tuple(parse_numbers(classes, "--classes", "0,1", int))
    return Sampling(classes=labels, **values)


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
            option("--seed", type=SEED, default=0, show_default=True, help=seed),
        ),
    )
