"""``dexport build``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dexport.cli.app import print_json, say_lossy
from dexport.cli.build_file import read_build_file
from dexport.cli.build_options import build_arguments
from dexport.cli.groups.engine import ENGINE, Engine
from dexport.cli.groups.graph import GRAPH, Graph
from dexport.cli.groups.network import NETWORK, Network
from dexport.cli.groups.output import OUTPUT, Output
from dexport.cli.groups.precision import PRECISION, Precision
from dexport.cli.groups.quantization import QUANTIZATION, Quantization
from dexport.cli.groups.weights import WEIGHTS, Weights
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, help_all
from dexport.collector import collector_paused
from dexport.errors import UsageError

GROUPS = (WEIGHTS, NETWORK, GRAPH, PRECISION, QUANTIZATION, ENGINE, OUTPUT)
"""The headings of the help, and the tables of a build file."""


def _take_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.default_map = read_build_file(path, GROUPS)


@command("build")
@click.argument("recipe", required=False)
@WEIGHTS
@NETWORK
@GRAPH
@PRECISION
@QUANTIZATION
@ENGINE
@OUTPUT
@option(
    "-c",
    "--config",
    type=PATH,
    is_eager=True,
    expose_value=False,
    callback=_take_file,
    metavar="FILE.toml",
    help="Take options from this file; those given here replace its.",
)
@help_all
def build_command(
    recipe: str | None,
    weights: Weights,
    network: Network,
    graph: Graph,
    precision: Precision,
    quantization: Quantization,
    engine: Engine,
    output: Output,
) -> None:
    """Build a bundle: ONNX file, engine, parity report, manifest.

    RECIPE is a name from `dexport recipes`, or a file with a recipe of your own.
    """
    from dexport.cli.commands.build_printer import print_result
    from dexport.cli.terminal import Progress
    from dexport.hashing import hash_ahead

    if (recipe is None) == (network.stitch is None):
        raise UsageError("give a recipe, or --stitch", hint="`dexport recipes` lists what can be built")
    hash_ahead(weights.main)
    with collector_paused():
        from dexport.exporter.build import exit_code
        from dexport.validate.build import build_and_validate

    arguments = build_arguments(weights, network, graph, precision, quantization, engine, output)
    folder = output.output or Path(Path(recipe).stem if recipe else "stitched")
    with Progress() as progress:
        result = build_and_validate(recipe, folder, listener=progress, **arguments)
    print_json(result.bundle.manifest) if output.as_json else print_result(result)
    say_lossy(result.bundle.acceptable, result.status, result.loss)
    sys.exit(exit_code(result))
