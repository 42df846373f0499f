"""``dexport diff``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dexport.choices import STATES
from dexport.cli.app import print_json
from dexport.cli.groups.recorded import Recorded, recorded
from dexport.cli.headings import command, option
from dexport.cli.parameters import (
    PATH,
    SEED,
    as_json_beside_progress,
    choice,
    one_graph,
    one_network,
    require_signature,
)
from dexport.errors import GateError, UsageError

PROFILE = option("--profile", metavar="FILE", help="The profile's file for --fix, where the bundle was built with one.")


@command("diff")
@click.argument("bundle", type=PATH)
@click.argument("other", type=PATH, required=False)
@recorded(PROFILE)
@one_network
@one_graph
@option(
    "--states",
    type=choice(*STATES),
    default=STATES[0],
    show_default=True,
    help="Inputs: the recipe's examples, or states of a short sampling run with PyTorch.",
)
@option("--seed", type=SEED, default=0, show_default=True, help="Seed of the inputs.")
@option("--fix", is_flag=True, help="Where rounding or overflow is at fault, build again with the islands found.")
@option("-o", "--output", type=PATH, help="Folder of that bundle. [default: BUNDLE-fixed]")
@require_signature
@as_json_beside_progress
def diff_command(
    bundle: Path,
    other: Path | None,
    recorded: Recorded,
    network: str | None,
    graph: str | None,
    states: str,
    seed: int,
    fix: bool,
    output: Path | None,
    require_signature: Path | None,
    as_json: bool,
) -> None:
    """Find the first block that computes something wrong, and the operation in it.

    BUNDLE is compared with PyTorch; or OTHER, a bundle of the same network, with BUNDLE. Exit with 1 where something is
    found.
    """
    from dexport.bundle import load_bundle
    from dexport.cli.commands.build_printer import print_result
    from dexport.cli.commands.diff_printer import print_diff
    from dexport.cli.terminal import Progress
    from dexport.exporter.rebuild import recorded_options
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.compare.diff import diff
    from dexport.validate.compare.fix import fixing_islands, rebuild

    _check_fix(fix, output, recorded.profile, other)
    place = bundle.absolute()
    target = output or place.with_name(f"{place.name}-fixed")
    if fix and target.exists():
        raise UsageError(f"{target} exists already", hint="choose another folder with -o")
    loaded, recipe = load_bundle(bundle, require_signature), find_recipe(recorded.recipe) if recorded.recipe else None
    built = recorded_options(loaded, target, recorded.checkpoint, recipe, recorded.profile) if fix else None
    with Progress() as progress:
        progress.start("diff")
        result = diff(
            loaded,
            load_bundle(other, require_signature) if other else None,
            network=network,
            graph=graph or "",
            checkpoint=recorded.checkpoint,
            recipe=recipe,
            states=states,
            seed=seed,
            on_progress=progress.advance,
        )
    print_json(result.to_json()) if as_json else print_diff(result)
    if built is not None:
        with Progress() as progress:
            rebuilt = rebuild(*built, fixing_islands(result), progress)
        if not as_json:
            print_result(rebuilt)
    sys.exit(0 if result.passed else GateError.exit_code)


def _check_fix(fix: bool, output: Path | None, profile: str | None, other: Path | None) -> None:
    if output is not None and not fix:
        raise UsageError("-o needs --fix: nothing else is written", hint="add --fix")
    if profile is not None and not fix:
        raise UsageError("--profile needs --fix: nothing else is built", hint="add --fix")
    if fix and other is not None:
        raise UsageError("--fix is for one bundle", hint=f"dexport diff {other} --fix")
