"""``dexport compare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from dexport.cli.app import print_json, say_lossy
from dexport.cli.groups.gates import accept_loss_of_report
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, SEED, OutputPath, as_json_beside_progress, parse_ports, ports
from dexport.errors import GateError, UsageError
from dexport.verdict import LOSSY


@command("compare")
@click.argument("model", type=PATH)
@option("--recipe", required=True, metavar="NAME|FILE", help="What MODEL should compute.")
@option(
    "--checkpoint", metavar="FILE|HUB", help="The weights that MODEL was made from. Without: seeded random weights."
)
@ports
@option("--seed", type=SEED, default=0, show_default=True, help="Seed of the inputs.")
@option("-o", "--output", type=OutputPath(), help="Write the report as JSON.")
@accept_loss_of_report
@as_json_beside_progress
def compare_command(
    model: Path,
    recipe: str,
    checkpoint: str | None,
    ports: tuple[str, ...],
    seed: int,
    output: Path | None,
    accept_loss: bool,
    as_json: bool,
) -> None:
    """Compare an ONNX file that something else made with a recipe's network; exit with 1 where the gate fails.

    Single evaluations are compared, at the file's batch and size. A bundle is for `dexport validate`.
    """
    from dexport.cli.commands.compare_printer import print_parity
    from dexport.cli.terminal import Progress
    from dexport.exporter.recipes import find_recipe
    from dexport.files import write_whole
    from dexport.validate.onnx_file.foreign import validate_foreign

    if model.is_dir():
        raise UsageError(f"{model} is a folder, not an ONNX file", hint=f"for a bundle: dexport validate {model}")
    with Progress() as progress:
        progress.start("compare")
        report = validate_foreign(
            model,
            find_recipe(recipe),
            checkpoint,
            ports=parse_ports(ports),
            seed=seed,
            on_progress=progress.advance,
        )
    if output is not None:
        write_whole(output, json.dumps(report.to_json(), indent=2) + "\n")
    print_json(report.to_json()) if as_json else print_parity(report, str(model))
    acceptable = report.passed or (accept_loss and report.status == LOSSY)
    say_lossy(acceptable, report.status, report.loss)
    sys.exit(0 if acceptable else GateError.exit_code)
