"""``dexport recipes``."""

from __future__ import annotations

from dexport.cli.app import print_json
from dexport.cli.headings import command
from dexport.cli.parameters import as_json


@command("recipes")
@as_json
def recipes_command(as_json: bool) -> None:
    """List the model variants and systems that can be built, with their parameter counts."""
    from dexport.cli.commands.recipes_printer import print_recipes
    from dexport.exporter.describe import describe
    from dexport.exporter.recipes import all_buildable

    described = [describe(found) for found in all_buildable().values()]
    print_json(described) if as_json else print_recipes(described)
