"""``dexport sample``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from dexport.cli.app import print_json
from dexport.cli.groups.runtime import RUNTIME, Runtime
from dexport.cli.groups.sampling import Sampling, class_labels, pictures, sampling
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, OutputPath, as_json_beside_progress

SAMPLING = sampling(
    class_labels("Class labels. [default: the first ten]"),
    *pictures,
    seed="Seed of the noise; each picture has its own stream.",
)


@command("sample")
@click.argument("bundle", type=PATH)
@SAMPLING
@RUNTIME
@option(
    "--stitch-fraction",
    "fraction",
    type=float,
    help="Share of the trajectory of the first of two stitched denoisers, 0 to 1. [default: the bundle's]",
)
@option(
    "-o",
    "--output",
    type=OutputPath(),
    default=Path("samples.png"),
    show_default=True,
    help="PNG file of the labelled grid; the pictures go to a folder beside it.",
)
@option("--force", is_flag=True, help="Replace samples of another run.")
@as_json_beside_progress
def sample_command(
    bundle: Path,
    sampling: Sampling,
    runtime: Runtime,
    fraction: float | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Generate images with a bundle: a labelled grid, and every picture.

    Needs neither torch nor onnx. A run that was interrupted makes the missing pictures only.
    """
    from dexport.cli.commands.sample_printer import print_generated
    from dexport.cli.terminal import Progress, warn
    from dexport.runtime.generate import check_request, generate
    from dexport.runtime.pipeline import Pipeline
    from dexport.runtime.stitch import halves

    request: dict[str, Any] = {
        "output": output,
        "classes": sampling.classes or (),
        "count": sampling.count,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "cfg_scale": sampling.cfg_scale,
        "seed": sampling.seed,
        "batch": sampling.batch,
        "fractions": () if fraction is None else halves(fraction),
    }
    with Progress() as progress:
        progress.start("sample")
        check = partial(check_request, **request)
        pipeline = Pipeline.open(bundle, runtime.provider, runtime.decoder, runtime.require_signature, check=check)
        warn(pipeline.bundle)
        generated = generate(pipeline, **request, force=force, on_progress=progress.advance)
    print_json(vars(generated)) if as_json else print_generated(generated)
