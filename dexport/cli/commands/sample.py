"""``dexport sample``."""

from __future__ import annotations

from pathlib import Path

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
    help="PNG file of the labelled grid; the pictures go to a folder beside it. Or an .npy file of what comes before "
    "the pictures, such as latents.",
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
    """Generate images with a bundle: a labelled grid, and every picture; or an array of latents.

    Needs neither torch nor onnx. A run that was interrupted makes the missing pictures only.
    """
    from dexport.cli.commands.sample_printer import print_array, print_generated
    from dexport.cli.terminal import Progress, warn
    from dexport.contract import Route
    from dexport.runtime.generate import SampleRequest, check_request, generate, generate_array
    from dexport.runtime.opened import OpenProgram
    from dexport.runtime.stitch import halves

    settings = sampling.settings
    if fraction is not None:
        settings["route"] = tuple(map(Route, halves(fraction)))
    request = SampleRequest(sampling.classes or (), sampling.count, sampling.seed, sampling.batch, settings)
    with Progress() as progress:
        progress.start("sample")
        program = OpenProgram.open(bundle, runtime.provider, runtime.players, runtime.require_signature)
        if output.suffix.lower() == ".npy":
            warn(program.bundle)
            array = generate_array(program, output, request, on_progress=progress.advance)
            print_json(vars(array)) if as_json else print_array(array)
            return
        check_request(program, output, request)
        warn(program.bundle)
        generated = generate(program, output, request, force=force, on_progress=progress.advance)
    print_json(vars(generated)) if as_json else print_generated(generated)
