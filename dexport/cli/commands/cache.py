"""``dexport cache``."""

from __future__ import annotations

import click

from dexport.cli.app import print_json
from dexport.cli.headings import option
from dexport.cli.parameters import GIGABYTES, as_json
from dexport.errors import MachineError


@click.group("cache")
def cache_group() -> None:
    """What earlier builds left for later ones: DEXPORT_CACHE, or dexport in the XDG cache folder."""


@cache_group.command("ls")
@as_json
def cache_ls_command(as_json: bool) -> None:
    """List the entries, the most recently used first."""
    from dexport.cli.commands.cache_printer import print_cache
    from dexport.exporter.cache import existing_cache

    cache = existing_cache()
    entries = cache.entries()
    if as_json:
        print_json({"folder": cache.folder, "limit": cache.limit, "entries": [vars(entry) for entry in entries]})
    else:
        print_cache(cache.folder, cache.limit, entries)


@cache_group.command("prune")
@option("--keep-gb", type=GIGABYTES, default=0.0, show_default=True, help="Keep this much.")
@as_json
def cache_prune_command(keep_gb: float, as_json: bool) -> None:
    """Remove entries, the least recently used first."""
    from dexport.exporter.cache import LockedError, existing_cache

    cache = existing_cache()
    try:
        removed = cache.prune(int(keep_gb * 1e9))
    except LockedError as error:
        raise MachineError(str(error), hint="end that process") from error
    if as_json:
        print_json([vars(entry) for entry in removed])
    else:
        click.echo(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e9:.2f} GB")
