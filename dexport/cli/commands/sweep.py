"""``dexport sweep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dexport.cli.app import print_json
from dexport.cli.groups.runtime import RUNTIME, Runtime
from dexport.cli.groups.sampling import Sampling, pictures, sampling
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, OutputPath, as_json_beside_progress, parse_numbers
from dexport.errors import UsageError
from dexport.limits import shown

FRACTIONS = "0,0.2,0.4,0.6,0.8,1"


def _values(over: str | None, fractions: str) -> tuple[str, list[Any]]:
    """The setting, empty for shares, and its values: numbers where they are, else words."""
    if over is None:
        return "", list(parse_numbers(fractions, "--fractions", "0,0.4,1", float))
    name, equals, text = over.partition("=")
    if not equals or not name or not text:
        raise UsageError(f"--over {shown(over)} is not NAME=VALUE,VALUE", hint="for example --over steps=10,20,50")
    values: list[Any] = []
    for item in text.split(","):
        try:
            values.append(json.loads(item))
        except ValueError:
            values.append(item)
    return name, values


@command("sweep")
@click.argument("bundle", type=PATH)
@option(
    "-o",
    "--output",
    type=OutputPath(),
    default=Path("sweep.json"),
    show_default=True,
    help="JSON file; the plot goes beside it, as PNG.",
)
@option("--fractions", default=FRACTIONS, show_default=True, help="Shares of the first of two denoisers.")
@option("--over", metavar="NAME=V,V", help="Values of a setting of the program instead, such as steps=10,20,50.")
@option("--reference", type=PATH, help="Real images: an .npz with arr_0 (N,H,W,C) uint8.")
@sampling(*pictures, seed="Seed of the noise, the same at every share.")
@RUNTIME
@as_json_beside_progress
def sweep_command(
    bundle: Path,
    output: Path,
    fractions: str,
    over: str | None,
    reference: Path | None,
    sampling: Sampling,
    runtime: Runtime,
    as_json: bool,
) -> None:
    """Sample with several values of a setting: what each costs, and how far the images move.

    By default the setting is the share of the first of two stitched denoisers.
    """
    from dexport.cli.commands.sweep_printer import print_sweep
    from dexport.cli.sweep_points import points_of
    from dexport.cli.terminal import Progress, warn
    from dexport.files import write_whole
    from dexport.optional import optional_import
    from dexport.places import check_place
    from dexport.runtime.opened import OpenProgram
    from dexport.validate.distances import load_images
    from dexport.validate.sweep import plot, sweep

    optional_import("matplotlib")  # the plot comes last
    with Progress() as progress:
        progress.start("sweep")
        over_what, values = _values(over, fractions)
        check_place(output.with_suffix(".png"))
        real = load_images(reference) if reference else None
        program = OpenProgram.open(bundle, runtime.provider, runtime.players, runtime.require_signature)
        program = program.with_settings(**sampling.settings)
        warn(program.bundle)
        result = sweep(
            program,
            *points_of(program, over_what, values),
            reference=real,
            count=sampling.count,
            seed=sampling.seed,
            batch=sampling.batch,
            on_progress=progress.advance,
        )
    plot(result, output.with_suffix(".png"))
    write_whole(output, json.dumps(result.to_json(), indent=2) + "\n")
    print_json(result.to_json()) if as_json else print_sweep(result, output)
