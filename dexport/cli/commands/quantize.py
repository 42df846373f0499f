"""``dexport quantize``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dexport.cli.app import print_json, say_lossy
from dexport.cli.build_options import requantization_arguments
from dexport.cli.groups.output import NEW_BUNDLE, Output
from dexport.cli.groups.quantization import QUANTIZATION, Quantization
from dexport.cli.groups.recorded import Recorded, recorded
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, help_all, require_signature

PROFILE = option("--profile", metavar="FILE", help="The profile, where the bundle was built with a file.")


@command("quantize")
@click.argument("bundle", type=PATH)
@QUANTIZATION
@recorded(PROFILE)
@NEW_BUNDLE
@require_signature
@help_all
def quantize_command(
    bundle: Path,
    quantization: Quantization,
    recorded: Recorded,
    output: Output,
    require_signature: Path | None,
) -> None:
    """Build BUNDLE again with quantised weights: same recipe, size, guidance, precision and engine.

    It takes the checkpoint that BUNDLE was built from, and checks that it is that one.
    """
    from dexport.cli.commands.build_printer import print_result
    from dexport.cli.terminal import Progress
    from dexport.exporter.build import exit_code
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.build import quantise_and_validate

    assert output.output is not None
    with Progress() as progress:
        result = quantise_and_validate(
            bundle,
            output.output,
            require_signature=require_signature,
            listener=progress,
            recipe=find_recipe(recorded.recipe) if recorded.recipe else None,
            checkpoint=recorded.checkpoint,
            profile=recorded.profile,
            parity=output.parity,
            accept_loss=output.accept_loss,
            force=output.force,
            **requantization_arguments(quantization),
        )
    print_json(result.bundle.manifest) if output.as_json else print_result(result)
    say_lossy(result.bundle.acceptable, result.status, result.loss)
    sys.exit(exit_code(result))
