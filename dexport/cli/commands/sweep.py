"""``dexport sweep``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dexport.cli.app import print_json
from dexport.cli.groups.runtime import RUNTIME, Runtime
from dexport.cli.groups.sampling import Sampling, pictures, sampling
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, OutputPath, as_json_beside_progress, parse_numbers


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
@option("--fractions", default="0,0.2,0.4,0.6,0.8,1", show_default=True, help="Shares of the first denoiser.")
@option("--reference", type=PATH, help="Real images: an .npz with arr_0 (N,H,W,C) uint8.")
@sampling(*pictures, seed="Seed of the noise, the same at every share.")
@RUNTIME
@as_json_beside_progress
def sweep_command(
    bundle: Path,
    output: Path,
    fractions: str,
    reference: Path | None,
    sampling: Sampling,
    runtime: Runtime,
    as_json: bool,
) -> None:
    """Stitch two denoisers at several shares: what it costs, and how far the images move."""
    from dexport.cli.commands.sweep_printer import print_sweep
    from dexport.cli.terminal import Progress, warn
    from dexport.files import write_whole
    from dexport.optional import optional_import
    from dexport.places import check_place
    from dexport.runtime.pipeline import Pipeline
    from dexport.validate.distances import load_images
    from dexport.validate.sweep import plot, sweep

    optional_import("matplotlib")  # the plot comes last
    with Progress() as progress:
        progress.start("sweep")
        shares = parse_numbers(fractions, "--fractions", "0,0.4,1", float)
        check_place(output.with_suffix(".png"))
        real = load_images(reference) if reference else None
        pipeline = Pipeline.open(bundle, runtime.provider, runtime.decoder, runtime.require_signature)
        warn(pipeline.bundle)
        result = sweep(
            pipeline,
            shares,
            reference=real,
            count=sampling.count,
            sampler=sampling.sampler,
            steps=sampling.steps,
            cfg_scale=sampling.cfg_scale,
            seed=sampling.seed,
            batch=sampling.batch,
            on_progress=progress.advance,
        )
    plot(result, output.with_suffix(".png"))
    write_whole(output, json.dumps(result.to_json(), indent=2) + "\n")
    print_json(result.to_json()) if as_json else print_sweep(result, output)
