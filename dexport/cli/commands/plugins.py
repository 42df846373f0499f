"""``dexport plugins``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dexport.choices import DTYPES
from dexport.cli.app import print_json
from dexport.cli.headings import option
from dexport.cli.parameters import PATH, as_json, choice, split_commas


@click.group("plugins")
def plugins_group() -> None:
    """The custom ops and their kernels."""


@plugins_group.command("compile")
@option(
    "--target",
    "targets",
    multiple=True,
    metavar="SM[,SM]",
    help="GPU architectures; no GPU is needed. [default: sm80,sm89,sm90,sm100,sm120]",
)
@option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=choice(*DTYPES),
    default=DTYPES[:1],
    show_default=True,
    help="Types to compile for. Repeatable.",
)
@option("-o", "--output", type=PATH, help="Folder for the PTX and cubin files.")
@as_json
def compile_command(targets: tuple[str, ...], dtypes: tuple[Any, ...], output: Path | None, as_json: bool) -> None:
    """Compile every kernel at the published sizes; print registers, shared memory and spills."""
    from dexport.cli.commands.plugins_printer import print_kernels
    from dexport.plugins.compile import TARGETS, compile_all, write_kernels

    compiled = compile_all(split_commas(targets) or TARGETS, dtypes)
    if output is not None:
        write_kernels(compiled, output)
    summaries = [kernel.summary() for kernel in compiled]
    print_json(summaries) if as_json else print_kernels(summaries)
