"""The command line: parse, call, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dexport.bundle import writing_to
from dexport.errors import DexportError, GateError, MachineError, UsageError
from dexport.version import __version__

BUILDING = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "psutil", "ml_dtypes")
"""Packages that building needs and sampling does not: an environment may lack them."""
Number = TypeVar("Number", int, float)


class Group(click.Group):
    """Prints a DexportError as a message with its fix, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DexportError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            if error.hint:
                click.echo(f"fix: {error.hint}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if error.name not in BUILDING:
                raise
            click.secho(f"error: this needs {error.name}, which is not installed", fg="red", err=True)
            click.echo("fix: pip install dexport; `sample` and `info` of a bundle do without", err=True)
            ctx.exit(MachineError.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dexport")
def main() -> None:
    """Diffusion backbones from PyTorch to ONNX and TensorRT, with proof that they still compute the same.

    Exit codes: 0 fine, 1 a gate failed, 2 usage, 3 environment, 4 bad input.
    """


@main.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes_command(as_json: bool) -> None:
    """List the model variants that can be built, with their parameter counts."""
    from dexport.console import print_recipes
    from dexport.exporter.describe import describe_recipe
    from dexport.exporter.recipes import all_recipes

    described = [describe_recipe(recipe) for recipe in all_recipes().values()]
    _print_json(described) if as_json else print_recipes(described)


@main.command("info")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(name: str, as_json: bool) -> None:
    """Show a recipe (NAME, or a recipe file) or a bundle (its folder; write ./NAME if a recipe is called like it)."""
    from dexport.console import print_bundle, print_recipe

    if Path(name).is_dir() and not _is_recipe(name):
        from dexport.bundle import load_bundle

        bundle = load_bundle(name)
        _print_json(bundle.manifest) if as_json else print_bundle(bundle)
        return
    from dexport.exporter.describe import describe_recipe
    from dexport.exporter.recipes import find_recipe

    described = describe_recipe(find_recipe(name))
    _print_json(described) if as_json else print_recipe(described)


@main.command("build")
@click.argument("recipe", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle. [default: RECIPE]")
@click.option(
    "--checkpoint",
    metavar="FILE|HUB",
    help="Weights: a file, hf://owner/name/file, or owner/name on the Hub. Without: seeded random weights.",
)
@click.option(
    "--init-from",
    metavar="FILE|HUB",
    help="Inherit from another model's checkpoint what the recipe allows (LiT from DiT: all but the attention).",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A constructor argument, such as hidden_size=384. Repeatable.",
)
@click.option("--image-size", type=int, metavar="PIXELS", help="Side of the square image.")
@click.option("--latent", metavar="HxW", help="Spatial size of the network's input, such as 8x20.")
@click.option(
    "--guidance",
    type=click.Choice(["none", "fused"]),
    default="none",
    show_default=True,
    help="fused: the graph applies the system's own guidance.",
)
@click.option("--fp32", "precision", flag_value="fp32", default=True, help="Compute in float32. [default]")
@click.option("--fp16", "precision", flag_value="fp16", help="Compute in float16 around float32 islands.")
@click.option("--bf16", "precision", flag_value="bf16", help="Compute in bfloat16 around float32 islands.")
@click.option(
    "--island",
    "islands",
    multiple=True,
    metavar="PATTERN",
    help="Keep a module in float32, such as 'final_layer' or 'blocks.2*'. Repeatable.",
)
@click.option(
    "--int8",
    type=click.Choice(["weight", "w8a8"]),
    help="Quantise linear layers and convolutions: weights only, or activations too.",
)
@click.option("--calibration-images", type=int, default=32, show_default=True, help="Sampled to find ranges for w8a8.")
@click.option("--calibration-seed", default=0, show_default=True, help="Seed of their noise.")
@click.option("--opset", default=23, show_default=True, help="ONNX opset.")
@click.option("--trt", is_flag=True, help="Build a TensorRT engine as well.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="auto: tensorrt where there is a GPU and the package, else tensorrt-rtx.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="SM[,SM]",
    help="GPU architectures, such as sm80,sm89,sm120. Repeatable.",
)
@click.option(
    "--plugins",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Plugin kernels in tensorrt engines (TensorRT-RTX has none); the ONNX file has function bodies either way.",
)
@click.option(
    "--ternary/--no-ternary",
    default=None,
    help="Store ternary layers in a few bits per value. [default: where a recipe has them; it loses nothing]",
)
@click.option(
    "--ternary-carrier",
    type=click.Choice(["auto", "packed", "int4", "int8", "nbits2", "nbits4"]),
    default="auto",
    show_default=True,
    help="How: packed is the smallest, int4 is for TensorRT, nbits for ONNX Runtime only. "
    "auto: int4 for an engine, else the fastest measured in ONNX Runtime.",
)
@click.option(
    "--profile",
    default="latency",
    show_default=True,
    metavar="NAME|FILE",
    help="Batch range: latency, throughput, ci, or a TOML file.",
)
@click.option(
    "--stitch",
    metavar="NAME[=CHECKPOINT]:SHARE,...",
    help="Instead of RECIPE: several denoisers, noisiest first, with their shares of the trajectory. "
    "NAME is a recipe, or the folder of a bundle.",
)
@click.option("--with-decoder", is_flag=True, help="Put the decoder of the latents into the bundle.")
@click.option("--decoder-checkpoint", metavar="FILE|HUB", help="Weights of that decoder.")
@click.option("--parity/--no-parity", default=True, show_default=True, help="Compare with PyTorch and gate.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--cache/--no-cache", default=True, show_default=True, help="Take unchanged steps from earlier builds.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr.")
def build_command(
    recipe: str | None,
    output: Path | None,
    stitch: str | None,
    settings: tuple[str, ...],
    latent: str | None,
    targets: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Build a bundle: ONNX file, engine, parity report, manifest.

    RECIPE is a name from `dexport recipes`, or a file with a recipe of your own.
    """
    from dexport.console import Progress, print_result
    from dexport.exporter.build import exit_code
    from dexport.exporter.variant import parse_settings
    from dexport.validate.build import build_and_validate

    if (recipe is None) == (stitch is None):
        raise UsageError("give a recipe, or --stitch", hint="`dexport recipes` lists what can be built")
    with Progress() as progress:
        result = build_and_validate(
            recipe,
            output or Path(Path(recipe).stem if recipe else "stitched"),
            stitch=stitch,
            settings=parse_settings(settings),
            latent=_parse_latent(latent),
            targets=_split(targets),
            listener=progress,
            **options,
        )
    _print_json(result.bundle.manifest) if as_json else print_result(result)
    sys.exit(exit_code(result))


@main.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["forward", "trajectory"]),
    default=("forward", "trajectory"),
    show_default=True,
    help="Single evaluations, whole sampling runs. Repeatable.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the report as JSON.")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="[PART=]FILE",
    help="Where the weights of the build are now, if they were moved. Repeatable.",
)
@click.option("--recipe", metavar="FILE", help="The recipe file, where the bundle was built from one.")
@click.option("--classes", default="0,1", show_default=True, metavar="N,N", help="One trajectory per class label.")
@click.option("--steps", type=int, help="Sampling steps. [default: the system's]")
@click.option("--cfg", "cfg_scale", type=float, help="Guidance scale, 1 for none. [default: the system's]")
@click.option("--sampler", metavar="NAME", help="ddpm or ddim, where the model fits. [default: the system's]")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option("--fail-under", metavar="snr=DB", help="Smallest SNR of the final latents. [default: by precision]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; progress goes to stderr.")
def validate_command(
    bundle: Path,
    output: Path | None,
    levels: tuple[str, ...],
    checkpoints: tuple[str, ...],
    recipe: str | None,
    classes: str,
    fail_under: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare a bundle with the PyTorch networks that it was built from; exit with 1 where a gate fails."""
    from dexport.bundle import load_bundle
    from dexport.console import Progress, print_validation
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.validate import validate

    with Progress() as progress:
        progress.start("validate")
        result = validate(
            load_bundle(bundle),
            levels,
            checkpoints={part: path for part, _, path in (text.rpartition("=") for text in checkpoints)},
            recipe=find_recipe(recipe) if recipe else None,
            labels=_parse_numbers(classes, "--classes", "0,1", int),
            snr_db=_parse_gate(fail_under),
            on_progress=progress.advance,
            **options,
        )
    if output is not None:
        with writing_to(output.parent):
            output.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    _print_json(result.to_json()) if as_json else print_validation(result)
    sys.exit(0 if result.passed else GateError.exit_code)


@main.command("sample")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("samples.png"),
    show_default=True,
    help="PNG file of the labelled grid; the pictures go to a folder beside it.",
)
@click.option("--classes", metavar="N,N", help="Class labels. [default: the first ten]")
@click.option("--count", default=1, show_default=True, help="Pictures per class.")
@click.option("--steps", type=int, help="Sampling steps. [default: the system's]")
@click.option("--cfg", "cfg_scale", type=float, help="Guidance scale, 1 for none. [default: the system's]")
@click.option("--sampler", metavar="NAME", help="ddpm or ddim, where the model fits. [default: the system's]")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise; each picture has its own stream.")
@click.option("--batch", default=8, show_default=True, help="Pictures that are made together.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="What runs the networks.",
)
@click.option("--decoder", type=click.Path(path_type=Path), help="A decoder's bundle, where BUNDLE brings none.")
@click.option(
    "--stitch-fraction",
    "fraction",
    type=float,
    help="Share of the trajectory of the first of two stitched denoisers, 0 to 1. [default: the bundle's]",
)
@click.option("--force", is_flag=True, help="Replace samples of another run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def sample_command(
    bundle: Path,
    provider: str,
    decoder: Path | None,
    classes: str | None,
    fraction: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate images with a bundle: a labelled grid, and every picture.

    Needs neither torch nor onnx. A run that was interrupted makes the missing pictures only.
    """
    from dexport.console import Progress, print_generated
    from dexport.runtime.generate import generate
    from dexport.runtime.pipeline import Pipeline
    from dexport.runtime.stitch import halves

    with Progress() as progress:
        progress.start("sample")
        generated = generate(
            Pipeline.open(bundle, provider, decoder),
            classes=_parse_numbers(classes or "", "--classes", "207,360", int),
            fractions=() if fraction is None else halves(fraction),
            on_progress=progress.advance,
            **options,
        )
    _print_json(vars(generated)) if as_json else print_generated(generated)


@main.command("sweep")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("sweep.json"),
    show_default=True,
    help="JSON file; the plot goes beside it, as PNG.",
)
@click.option("--fractions", default="0,0.2,0.4,0.6,0.8,1", show_default=True, help="Shares of the first denoiser.")
@click.option("--reference", type=click.Path(path_type=Path), help="Real images: an .npz with arr_0 (N,H,W,C) uint8.")
@click.option("--count", default=1, show_default=True, help="Pictures per class.")
@click.option("--steps", type=int, help="Sampling steps. [default: the system's]")
@click.option("--cfg", "cfg_scale", type=float, help="Guidance scale, 1 for none. [default: the system's]")
@click.option("--sampler", metavar="NAME", help="ddpm or ddim, where the model fits. [default: the system's]")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise, the same at every share.")
@click.option("--batch", default=8, show_default=True, help="Pictures that are made together.")
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True)
@click.option("--decoder", type=click.Path(path_type=Path), help="A decoder's bundle, where BUNDLE brings none.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def sweep_command(
    bundle: Path,
    output: Path,
    fractions: str,
    reference: Path | None,
    provider: str,
    decoder: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Stitch two denoisers at several shares: what it costs, and how far the images move."""
    from dexport.console import Progress, print_sweep
    from dexport.runtime.pipeline import Pipeline
    from dexport.validate.distances import load_images
    from dexport.validate.sweep import plot, sweep

    with Progress() as progress:
        progress.start("sweep")
        result = sweep(
            Pipeline.open(bundle, provider, decoder),
            _parse_numbers(fractions, "--fractions", "0,0.4,1", float),
            reference=load_images(reference) if reference else None,
            on_progress=progress.advance,
            **options,
        )
    plot(result, output.with_suffix(".png"))
    with writing_to(output.parent):
        output.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    _print_json(result.to_json()) if as_json else print_sweep(result, output)


@main.command("fid")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@click.option(
    "--evaluator",
    type=click.Choice(["inception", "efficientnet-lite0", "pixels"]),
    default="inception",
    show_default=True,
    help="The features. Only inception's distance is FID; the others are quick checks with names of their own.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="File of the evaluator's weights. [default: inside the installed package of the extra fid]",
)
@click.option("--save-stats", type=click.Path(path_type=Path), help="Write A's statistics in ADM's layout; without B.")
@click.option("--batch", default=32, show_default=True, help="Images that are evaluated together.")
@click.option("--seed", default=0, show_default=True, help="Seed of subsets, splits and the floor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def fid_command(a: Path, b: Path | None, save_stats: Path | None, seed: int, as_json: bool, **options: Any) -> None:
    """Distances of images A to a reference B: FID, sFID, KID, precision and recall, and the floor they stand on.

    A and B are folders of PNG files, .npz files of images (arr_0), or ADM's reference statistics.
    """
    from dexport.console import Progress, print_fid
    from dexport.validate.fid import measure_fid, save_statistics

    if (b is None) == (save_stats is None):
        raise UsageError("give a reference B, or --save-stats", hint="dexport fid samples/ reference.npz")
    with Progress() as progress:
        progress.start("fid")
        if save_stats is not None:
            facts = save_statistics(a, save_stats, on_progress=progress.advance, **options)
        else:
            report = measure_fid(a, b, seed=seed, on_progress=progress.advance, **options)  # type: ignore[arg-type]
    if save_stats is not None:
        _print_json(facts) if as_json else click.echo(f"{save_stats}: {facts['count']} images, {facts['evaluator']}")
    else:
        _print_json(report.to_json()) if as_json else print_fid(report)


@main.group("plugins")
def plugins_group() -> None:
    """The custom ops and their kernels."""


@plugins_group.command("compile")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="SM[,SM]",
    help="GPU architectures; no GPU is needed. [default: sm80,sm89,sm90,sm100,sm120]",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default=("float16",),
    show_default=True,
    help="Types to compile for. Repeatable.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the PTX and cubin files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compile_command(targets: tuple[str, ...], dtypes: tuple[Any, ...], output: Path | None, as_json: bool) -> None:
    """Compile every kernel at the published sizes; print registers, shared memory and spills."""
    from dexport.console import print_kernels
    from dexport.plugins.compile import TARGETS, compile_all, write_kernels

    compiled = compile_all(_split(targets) or TARGETS, dtypes)
    if output is not None:
        write_kernels(compiled, output)
    summaries = [kernel.summary() for kernel in compiled]
    _print_json(summaries) if as_json else print_kernels(summaries)


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(as_json: bool) -> None:
    """Say what this machine can build and run, with versions."""
    from dexport.console import print_machine
    from dexport.exporter.machine import describe_machine

    described = describe_machine()
    _print_json(described) if as_json else print_machine(described)


@main.group("cache")
def cache_group() -> None:
    """What earlier builds left for later ones: DEXPORT_CACHE, or dexport in the XDG cache folder."""


@cache_group.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache_ls_command(as_json: bool) -> None:
    """List the entries, the most recently used first."""
    from dexport.console import print_cache
    from dexport.exporter.cache import existing_cache

    cache = existing_cache()
    entries = cache.entries()
    if as_json:
        _print_json({"folder": cache.folder, "limit": cache.limit, "entries": [vars(entry) for entry in entries]})
    else:
        print_cache(cache.folder, cache.limit, entries)


@cache_group.command("prune")
@click.option("--keep-gb", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Keep this much.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache_prune_command(keep_gb: float, as_json: bool) -> None:
    """Remove entries, the least recently used first."""
    from dexport.exporter.cache import existing_cache

    removed = existing_cache().prune(int(keep_gb * 1e9))
    if as_json:
        _print_json([vars(entry) for entry in removed])
    else:
        click.echo(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e9:.2f} GB")


def _is_recipe(name: str) -> bool:
    if Path(name).name != name:
        return False
    try:
        from dexport.exporter.recipes import all_recipes
    except ModuleNotFoundError:  # nothing can be built here, so it names a folder
        return False
    return name in all_recipes()


def _split(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for target in targets for part in target.split(",") if part)


def _parse_latent(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise UsageError(f"--latent {text!r} is not HEIGHTxWIDTH", hint="for example --latent 8x20")
    return int(height), int(width)


def _parse_numbers(text: str, option: str, example: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", hint=f"for example {option} {example}"
        ) from error


def _parse_gate(text: str | None) -> float | None:
    name, _, value = (text or "snr=").partition("=")
    try:
        if name == "snr":
            return float(value) if text else None
    except ValueError:
        pass
    raise UsageError(f"--fail-under {text!r} is not snr=DB", hint="for example --fail-under snr=25")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))
