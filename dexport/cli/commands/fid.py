"""``dexport fid``."""

from __future__ import annotations

from pathlib import Path

import click

from dexport.choices import EVALUATORS
from dexport.cli.app import print_json
from dexport.cli.headings import command, option
from dexport.cli.parameters import BATCH, PATH, SEED, OutputPath, as_json_beside_progress, choice
from dexport.errors import UsageError


@command("fid")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH, required=False)
@option(
    "--evaluator",
    type=choice(*EVALUATORS),
    default=EVALUATORS[0],
    show_default=True,
    help="The features. Only inception's distance is FID; the others are quick checks with names of their own.",
)
@option(
    "--weights",
    type=PATH,
    help="File of the evaluator's weights. [default: inside the installed package of the extra fid]",
)
@option("--save-stats", type=OutputPath(), help="Write A's statistics in ADM's layout; without B.")
@option("--batch", type=BATCH, default=32, show_default=True, help="Images that are evaluated together.")
@option("--seed", type=SEED, default=0, show_default=True, help="Seed of subsets, splits and the floor.")
@as_json_beside_progress
def fid_command(
    a: Path,
    b: Path | None,
    evaluator: str,
    weights: Path | None,
    save_stats: Path | None,
    batch: int,
    seed: int,
    as_json: bool,
) -> None:
    """Distances of images A to a reference B: FID, sFID, KID, precision and recall, and the floor they stand on.

    A and B are folders of PNG, JPEG and WebP files, .npz files of images (arr_0), or ADM's reference statistics.
    """
    from dexport.cli.commands.fid_printer import print_fid, print_saved_statistics
    from dexport.cli.terminal import Progress
    from dexport.validate.fid import measure_fid, save_statistics

    if (b is None) == (save_stats is None):
        raise UsageError("give a reference B, or --save-stats", hint="dexport fid samples/ reference.npz")
    with Progress() as progress:
        progress.start("fid")
        if b is None:
            assert save_stats is not None
            facts = save_statistics(
                a, save_stats, evaluator=evaluator, weights=weights, batch=batch, on_progress=progress.advance
            )
        else:
            report = measure_fid(
                a, b, evaluator=evaluator, weights=weights, batch=batch, seed=seed, on_progress=progress.advance
            )
    if b is None:
        print_json(facts) if as_json else print_saved_statistics(facts)
    else:
        print_json(report.to_json()) if as_json else print_fid(report)
