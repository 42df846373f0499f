"""Options under one heading of the help, which reach a command as one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from dexport.cli.headings import Decorator, Option


@dataclass(frozen=True)
class OptionGroup:
    """A decorator of commands.

    Attributes:
        name: the command's argument that gets the value, and the table of a build file.
        title: the heading.
        make: gets the options by their parameters' names, and gives the value.
        options: decorators, such as :func:`dexport.cli.headings.option`, that add one option each.
    """

    name: str
    title: str
    make: Callable[..., Any]
    options: tuple[Decorator, ...]

    def __call__(self, command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[str] = []

        @functools.wraps(command)
        def collecting(**values: Any) -> None:
            mine = {name: values.pop(name) for name in parameters}
            command(**values, **{self.name: self.make(**mine)})

        before = len(_declared(command))
        for add in reversed(self.options):
            add(collecting)
        for parameter in _declared(collecting)[before:]:
            parameters.append(str(parameter.name))
            if isinstance(parameter, Option):
                parameter.heading = self.title
        return collecting

    def declared(self) -> list[click.Option]:
        """The options by themselves, in the order of the help."""

        def command() -> None: ...

        for add in reversed(self.options):
            add(command)
        return [parameter for parameter in reversed(_declared(command)) if isinstance(parameter, click.Option)]


def _declared(command: Callable[..., None]) -> list[click.Parameter]:
    """What click's decorators leave with a function, the last one first."""
    return list(getattr(command, "__click_params__", ()))
