"""Kinds of parameters that several commands have: limits, files to write, what many commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from dexport import limits
from dexport.cli.headings import ALL_OPTIONS, option
from dexport.errors import UsageError

Number = TypeVar("Number", int, float)
PATH = click.Path(path_type=Path)


class OutputPath(click.Path):
    """A file to write. Where it cannot be written, or in a bundle's folder, is refused before there is any work."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from dexport.places import check_place

        path = Path(str(super().convert(value, param, ctx)))
        check_place(path)
        return path


class AtMost(click.ParamType):
    """A number that is at most so large, on either side of 0: what is too small, the commands know."""

    def __init__(self, kind: click.ParamType, most: float) -> None:
        self.kind, self.most, self.name = kind, most, kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = self.kind.convert(value, param, ctx)
        if not -self.most <= number <= self.most:  # nor is NaN
            option = param.opts[-1] if param else "a number"
            raise UsageError(f"{option} {limits.shown(number)} is out of range", hint=f"{self.most:,} is the most")
        return number


SEED = AtMost(click.INT, limits.LARGEST_SEED)
STEPS = AtMost(click.INT, limits.MOST_STEPS)
COUNT = AtMost(click.INT, limits.MOST_PICTURES)
BATCH = AtMost(click.INT, limits.MOST_BATCH)
SCALE = AtMost(click.FLOAT, limits.LARGEST_SCALE)
PIXELS = AtMost(click.INT, limits.LARGEST_SIDE)
CALIBRATION_IMAGES = AtMost(click.INT, limits.MOST_CALIBRATION_IMAGES)
THREADS = AtMost(click.INT, limits.MOST_THREADS)
ROUNDS = AtMost(click.INT, limits.MOST_ROUNDS)
GIGABYTES = AtMost(click.FloatRange(min=0), limits.LARGEST_CACHE_GB)


def _show_all(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        context.meta[ALL_OPTIONS] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()


help_all = option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show the options for experts as well.",
)
as_json = option("--json", "as_json", is_flag=True, help="Print JSON.")
as_json_beside_progress = option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
require_signature = option(
    "--require-signature",
    type=PATH,
    metavar="KEY.pub.pem",
    help="Refuse what this public key has not signed (`dexport pack --sign`).",
)
ports = option(
    "--port",
    "ports",
    multiple=True,
    metavar="NAME=NAME",
    help="An ONNX file's name of an input or output, behind the recipe's, where they differ. Repeatable.",
)


def given_options() -> dict[str, str]:
    """Parameters of the running command that its caller gave, with their options."""
    context = click.get_current_context()
    return {
        str(parameter.name): parameter.opts[-1]
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }


def refuse_contradiction(options: Sequence[str]) -> None:
    """Refuse options of which only one can hold; the same one twice is no contradiction.

    Raises:
        UsageError: two that differ.
    """
    different = list(dict.fromkeys(options))
    if len(different) > 1:
        raise UsageError(f"{' and '.join(different)} exclude each other", hint="give one of them")


def choice(*names: str) -> click.Choice[str]:
    """One of these names."""
    return click.Choice(names)


def split_commas(texts: Iterable[str]) -> tuple[str, ...]:
    """``("sm80,sm89", "sm120")`` -> ``("sm80", "sm89", "sm120")``."""
    return tuple(part for text in texts for part in text.split(",") if part)


def parse_numbers(text: str, option: str, example: str, kind: Callable[[str], Number]) -> list[Number]:
    """``"0,1"`` -> ``[0, 1]``.

    Raises:
        UsageError: it is not a list of numbers.
    """
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UsageError(
            f"{option} {limits.shown(text)} is not a list of numbers", hint=f"for example {option} {example}"
        ) from error


def parse_ports(texts: Iterable[str]) -> dict[str, str]:
    """``("x=sample",)`` -> ``{"x": "sample"}``.

    Raises:
        UsageError: another form, or a name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, there = text.partition("=")
        if not (name and equals and there):
            raise UsageError(f"--port {text!r} is not NAME=NAME", hint="for example --port x=sample")
        if name in found:
            raise UsageError(f"--port gives {name} twice", hint="give each once")
        found[name] = there
    return found


def by_part(texts: Iterable[str]) -> Mapping[str, str]:
    """``("decoder=vae.pt",)`` -> ``{"decoder": "vae.pt"}``; a bundle that holds one network has the part ``""``.

    A file that exists, such as ``lr=1/w.pt``, or one with a class behind it, names no part.

    Raises:
        UsageError: a part twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        part, equals, value = text.partition("=")
        if not equals or Path(text).exists() or Path(text.rpartition(":")[0]).is_file():
            part, value = "", text
        if part in found:
            raise UsageError(f"{found[part]} and {value}: one part is given twice", hint="name other parts: PART=...")
        found[part] = value
    return found


one_network = option(
    "--network", metavar="NAME", help="Of a bundle with several, such as decoder. [default: the main one]"
)
one_graph = option("--graph", metavar="NAME", help="Of a network with several. [default: the main one]")
