"""The type that a network computes in."""

from __future__ import annotations

from dataclasses import dataclass

import click
from click.core import ParameterSource

from dexport.choices import AUTO, PRECISIONS
from dexport.cli.headings import option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import choice, refuse_contradiction


@dataclass(frozen=True)
class Precision:
    """The type that the network computes in, and the modules that stay in float32."""

    precision: str
    islands: tuple[str, ...]


def _precision(precision: str, islands: tuple[str, ...], **flags: bool) -> Precision:
    short = [name for name, given in flags.items() if given]
    said = [f"--{name}" for name in short]
    source = click.get_current_context().get_parameter_source("precision")
    if source is ParameterSource.COMMANDLINE and precision not in short:
        said.append(f"--precision {precision}")
    if short:
        refuse_contradiction(said)
    return Precision(short[0] if short else precision, islands)


PRECISION = OptionGroup(
    "precision",
    "Precision",
    _precision,
    (
        option(
            "--precision",
            type=choice(*PRECISIONS, AUTO),
            default=PRECISIONS[0],
            show_default=True,
            help=f"What it computes in, around float32 islands; {', '.join(f'--{name}' for name in PRECISIONS)} say it "
            "in short. auto: float16 but for modules that it cannot hold, found by sampling with PyTorch.",
        ),
        *(option(f"--{name}", is_flag=True, hidden=True, help=f"Short for --precision {name}.") for name in PRECISIONS),
        option(
            "--island",
            "islands",
            multiple=True,
            metavar="PATTERN",
            help="Keep a module in float32, such as 'final_layer' or 'blocks.2*'. Repeatable.",
        ),
    ),
)
