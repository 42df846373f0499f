"""Command lines, parsed and not run."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dexport.cli import main


def parsed(arguments: Sequence[str]) -> click.Context:
    """The context of the command that ``arguments`` name, below its groups, whose settings it needs."""
    rest = list(arguments)
    context = click.Context(main, **main.context_settings)
    while isinstance(context.command, click.Group):
        name = rest.pop(0)
        command = context.command.commands[name]
        is_group = isinstance(command, click.Group)
        context = click.Context(command, context, name) if is_group else command.make_context(name, rest, context)
    return context
