"""``dexport info``."""

from __future__ import annotations

from pathlib import Path

import click

from dexport.cli.app import print_json
from dexport.cli.headings import command
from dexport.cli.parameters import as_json, require_signature


@command("info")
@click.argument("name")
@require_signature
@as_json
def info_command(name: str, require_signature: Path | None, as_json: bool) -> None:
    """Show a recipe or a system (NAME, or a recipe file), a bundle (its folder) or an archive.

    Write ./NAME if a recipe is called like the folder.
    """
    from dexport.archive import check, is_archive
    from dexport.cli.commands.info_printer import print_archive, print_bundle

    if is_archive(name):
        archive = check(name, require_signature)
        print_json(archive.manifest) if as_json else print_archive(archive, verified=require_signature is not None)
        return
    if Path(name).is_dir() and not _is_recipe(name):
        from dexport.bundle import load_bundle

        bundle = load_bundle(name, require_signature)
        print_json(bundle.manifest) if as_json else print_bundle(bundle)
        return
    from dexport.cli.commands.recipes_printer import print_recipe, print_system
    from dexport.exporter.describe import describe
    from dexport.exporter.recipes import find_buildable

    described = describe(find_buildable(name))
    if as_json:
        print_json(described)
    else:
        (print_system if "roles" in described else print_recipe)(described)


def _is_recipe(name: str) -> bool:
    if Path(name).name != name:
        return False
    try:
        from dexport.exporter.recipes import all_buildable
    except ModuleNotFoundError:  # nothing can be built here, so it names a folder
        return False
    return name in all_buildable()
