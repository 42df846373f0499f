"""``dexport bench``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dexport.choices import PROVIDERS
from dexport.cli.app import print_json
from dexport.cli.groups.gates import Gates, gates
from dexport.cli.headings import command, option
from dexport.cli.parameters import (
    BATCH,
    PATH,
    ROUNDS,
    THREADS,
    as_json_beside_progress,
    choice,
    one_graph,
    one_network,
    parse_ports,
    ports,
    require_signature,
)
from dexport.errors import GateError


@command("bench")
@click.argument("bundle", type=PATH)
@option("--against", type=PATH, help="Another bundle or ONNX file with the same inputs.")
@option("--recipe", metavar="FILE|NAME", help="The recipe, where BUNDLE is an ONNX file or was built from one.")
@option("--checkpoint", metavar="FILE", help="Where the weights of the build are now, if they were moved.")
@ports
@one_network
@one_graph
@option("--batch", "batches", multiple=True, type=BATCH, help="Repeatable. [default: the profile's]")
@option("--threads", type=THREADS, help="Of the CPU, for every side. [default: one per core]")
@option("--rounds", type=ROUNDS, default=7, show_default=True, help="Evaluations of each side, which take turns.")
@option(
    "--provider",
    type=choice(*PROVIDERS),
    default=PROVIDERS[0],
    show_default=True,
    help="What runs ONNX files. An engine runs wherever it can.",
)
@gates("Smallest speedup, speedup_against. Repeatable.", "Largest wall_ms.")
@require_signature
@as_json_beside_progress
def bench_command(
    bundle: Path,
    against: Path | None,
    recipe: str | None,
    checkpoint: str | None,
    ports: tuple[str, ...],
    network: str | None,
    graph: str | None,
    batches: tuple[int, ...],
    threads: int | None,
    rounds: int,
    provider: str,
    gates: Gates,
    require_signature: Path | None,
    as_json: bool,
) -> None:
    """Time one evaluation of a bundle, beside PyTorch eager in float32; exit with 1 where a gate does not pass.

    BUNDLE may also be an ONNX file that something else made; then --recipe NAME says what it computes.
    """
    from dexport.cli.commands.bench_printer import print_bench
    from dexport.cli.terminal import Progress
    from dexport.validate.bench.bench import bench
    from dexport.validate.gates import OF_BENCH, parse_limits

    limits = parse_limits(gates.fail_under, gates.fail_over, OF_BENCH)
    with Progress() as progress:
        progress.start("bench")
        report = bench(
            bundle,
            against=against,
            require_signature=require_signature,
            recipe=recipe,
            checkpoint=checkpoint,
            batches=batches,
            threads=threads,
            rounds=rounds,
            provider=provider,
            limits=limits,
            ports=parse_ports(ports),
            network=network,
            graph=graph or "",
            on_progress=progress.advance,
        )
    print_json(report.to_json()) if as_json else print_bench(report)
    sys.exit(0 if report.passed else GateError.exit_code)
