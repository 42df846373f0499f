"""Help under headings: options by their group, commands by what they are for.

Click alone, as packages that do the same add a third to the time in which ``dexport`` starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

Decorator = Callable[[Callable[..., None]], Callable[..., None]]
ALL_OPTIONS = "dexport.all_options"
"""Key of a context's ``meta``: the help shows the options for experts too."""
REST = "Other options"
WIDEST_NAME = 28
"""Columns; the text of a longer one starts below it."""
MARGINS = 6
"""Columns around a name and its text."""


class Option(click.Option):
    """An option that may stand under a heading."""

    heading: str | None = None


class ExpertOption(Option):
    """An option that few need: ``--help`` leaves it out, ``--help-all`` shows it."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return super().get_help_record(ctx) if ctx.meta.get(ALL_OPTIONS) else None


def option(*names: str, **settings: Any) -> Decorator:
    """Like ``click.option``, for an :class:`Option`."""
    return click.option(*names, **{"cls": Option, **settings})


def expert_option(*names: str, **settings: Any) -> Decorator:
    """Like ``click.option``, for an :class:`ExpertOption`."""
    return click.option(*names, cls=ExpertOption, **settings)


class Command(click.Command):
    """A command whose help shows options under their headings, and those that have none at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str | None, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "heading", None), []).append(record)
        rest = sections.pop(None, [])
        named = {str(heading): records for heading, records in sections.items()}
        _write({**named, REST if named else "Options": rest}, formatter)


def command(name: str) -> Callable[[Callable[..., None]], Command]:
    """Like ``click.command``, for a :class:`Command`."""
    return click.command(name, cls=Command)


class Group(click.Group):
    """A group whose help shows its commands under headings, in the order in which they were added."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sections: dict[str, Sequence[click.Command]] = {}

    def add_section(self, heading: str, *commands: click.Command) -> None:
        """Add commands under a heading."""
        self.sections[heading] = commands
        for each in commands:
            self.add_command(each)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        width = formatter.width - MARGINS - max(len(name) for name in self.commands)
        shown = {
            heading: [(str(each.name), each.get_short_help_str(width)) for each in commands]
            for heading, commands in self.sections.items()
        }
        _write(shown, formatter)


def _write(sections: Mapping[str, Sequence[tuple[str, str]]], formatter: click.HelpFormatter) -> None:
    """Write sections of names and texts, with all texts in one column."""
    names = [name for records in sections.values() for name, _ in records]
    width = min(max(map(len, names)), WIDEST_NAME)
    for heading, records in sections.items():
        with formatter.section(heading):
            (name, text), *others = records
            formatter.write_dl([(name.ljust(width), text), *others], col_max=WIDEST_NAME)
