"""The command line: parse, call, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from dexport import limits
from dexport.collector import collector_paused
from dexport.errors import GateError, MachineError, UsageError
from dexport.exits import report, running
from dexport.files import write_whole
from dexport.hashing import hash_ahead
from dexport.places import check_place
from dexport.verdict import ACCEPT, LOSSY, SHIPPABLE_SNR_DB, Loss, lossy_text
from dexport.version import __version__

Number = TypeVar("Number", int, float)
LONGEST_NUMBER = 9
"""Digits of a side, which keeps the product of two in bounds as well."""


class OneOfFlags(click.Option):
    """One of several flags that set one value: others beside it are refused, where click takes the last of them."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:  # noqa: ARG002 - click's signature
        parser.add_option(obj=self, opts=self.opts, dest=self.name, action="append_const", const=self.flag_value)

    def consume_value(self, ctx: click.Context, opts: Any) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        if not isinstance(value, list):
            return value, source
        _refuse_contradiction([f"--{each}" for each in value])
        return value[0], source


class OutputPath(click.Path):
    """A file to write. Where it cannot be written, or in a bundle's folder, is refused before there is any work."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        check_place(path)
        return path


class AtMost(click.ParamType):
    """A number that is at most so large, on either side of 0: what is too small, the commands know."""

    def __init__(self, kind: click.ParamType, most: float) -> None:
        self.kind, self.most, self.name = kind, most, kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = self.kind.convert(value, param, ctx)
        if not -self.most <= number <= self.most:  # nor is NaN
            option = param.opts[-1] if param else "a number"
            raise UsageError(f"{option} {limits.shown(number)} is out of range", hint=f"{self.most:,} is the most")
        return number


SEED = AtMost(click.INT, limits.LARGEST_SEED)
STEPS = AtMost(click.INT, limits.MOST_STEPS)
COUNT = AtMost(click.INT, limits.MOST_PICTURES)
BATCH = AtMost(click.INT, limits.MOST_BATCH)
SCALE = AtMost(click.FLOAT, limits.LARGEST_SCALE)
PIXELS = AtMost(click.INT, limits.LARGEST_SIDE)
CALIBRATION_IMAGES = AtMost(click.INT, limits.MOST_CALIBRATION_IMAGES)
THREADS = AtMost(click.INT, limits.MOST_THREADS)
ROUNDS = AtMost(click.INT, limits.MOST_ROUNDS)
GIGABYTES = AtMost(click.FloatRange(min=0), limits.LARGEST_CACHE_GB)

SIGNED = click.option(
    "--require-signature",
    type=click.Path(path_type=Path),
    metavar="KEY.pub.pem",
    help="Refuse what this public key has not signed (`dexport pack --sign`).",
)


PORT = click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="NAME=NAME",
    help="An ONNX file's name of an input or output, behind the recipe's, where they differ. Repeatable.",
)


ACCEPT_LOSS = click.option(
    "--accept-loss",
    is_flag=True,
    help="Exit with 0 although more is lost than is fit to ship; the manifest keeps that it was accepted.",
)


QUANTISATION = (
    click.option(
        "--int8",
        type=click.Choice(["weight", "w8a8"]),
        help="Quantise linear layers and convolutions: weights only, or activations too.",
    ),
    click.option(
        "--precision-map",
        metavar="FILE",
        help="JSON of layers (or glob patterns) and their schemes: float, int8, w8a8, int4, ternary. "
        "Or the manifest.json of a bundle.",
    ),
    click.option(
        "--budget",
        metavar="snr>=DB,size<=SHARE",
        help="Choose the scheme of each layer: the smallest file of this SNR (dB, after 20 steps), or the best SNR "
        "within this share of the float file (or size<=NMB).",
    ),
    click.option(
        "--calibration-images",
        type=CALIBRATION_IMAGES,
        default=32,
        show_default=True,
        help="Sampled to calibrate on.",
    ),
    click.option("--calibration-seed", type=SEED, default=0, show_default=True, help="Seed of their noise."),
    click.option(
        "--ternary/--no-ternary",
        default=None,
        help="Store ternary layers in a few bits per value; round those of other recipes to ternary, which loses "
        "a lot. [default: where a recipe has them; it loses nothing]",
    ),
    click.option(
        "--ternary-carrier",
        type=click.Choice(["auto", "packed", "int4", "int8", "nbits2", "nbits4"]),
        default="auto",
        show_default=True,
        help="How: packed is the smallest, int4 is for TensorRT, nbits for ONNX Runtime only. "
        "auto: int4 for an engine, else the fastest exact one measured in ONNX Runtime, or packed where it rounds.",
    ),
)
"""Options of every command that quantises."""


def quantisation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :data:`QUANTISATION`."""
    for option in reversed(QUANTISATION):
        command = option(command)
    return command


class Group(click.Group):
    """Ends every command with a message and the exit code of :mod:`dexport.exits`, whatever went wrong."""

    def main(self, *args: Any, **options: Any) -> Any:
        with running():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every command ends with a message
            ctx.exit(report(error))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dexport")
def main() -> None:
    """Diffusion backbones from PyTorch to ONNX and TensorRT, with proof that they still compute the same.

    Exit codes: 0 fine, 1 a gate failed, 2 usage, 3 environment, 4 bad input. 70 is a defect of dexport.
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
@SIGNED
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(name: str, require_signature: Path | None, as_json: bool) -> None:
    """Show a recipe (NAME, or a recipe file), a bundle (its folder) or an archive.

    Write ./NAME if a recipe is called like the folder.
    """
    from dexport.archive import check, is_archive
    from dexport.console import print_archive, print_bundle, print_recipe

    if is_archive(name):
        archive = check(name, require_signature)
        _print_json(archive.manifest) if as_json else print_archive(archive, verified=require_signature is not None)
        return
    if Path(name).is_dir() and not _is_recipe(name):
        from dexport.bundle import load_bundle

        bundle = load_bundle(name, require_signature)
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
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random weights.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A constructor argument, such as hidden_size=384. Repeatable.",
)
@click.option(
    "--outputs",
    type=click.Choice(["last", "all"]),
    help="all: also what the branches of lower resolution predict, where a model has branches (DiMR).",
)
@click.option("--image-size", type=PIXELS, metavar="PIXELS", help="Side of the square image.")
@click.option("--latent", metavar="HxW", help="Spatial size of the network's input, such as 8x20.")
@click.option(
    "--guidance",
    type=click.Choice(["none", "fused"]),
    default="none",
    show_default=True,
    help="fused: the graph applies the system's own guidance.",
)
@click.option(
    "--fp32", "precision", cls=OneOfFlags, flag_value="fp32", default=True, help="Compute in float32. [default]"
)
@click.option(
    "--fp16", "precision", cls=OneOfFlags, flag_value="fp16", help="Compute in float16 around float32 islands."
)
@click.option(
    "--bf16", "precision", cls=OneOfFlags, flag_value="bf16", help="Compute in bfloat16 around float32 islands."
)
@click.option(
    "--precision",
    "precision_name",
    type=click.Choice(["fp32", "fp16", "bf16", "auto"]),
    help="The same by name. auto: float16 but for modules that it cannot hold, found by sampling with PyTorch.",
)
@click.option(
    "--island",
    "islands",
    multiple=True,
    metavar="PATTERN",
    help="Keep a module in float32, such as 'final_layer' or 'blocks.2*'. Repeatable.",
)
@quantisation_options
@click.option(
    "--fold-steps",
    type=STEPS,
    metavar="STEPS",
    help="Compute what depends on time alone now, for the times of so many sampling steps; the bundle takes no others.",
)
@click.option("--opset", default=23, show_default=True, help="ONNX opset.")
@click.option(
    "--no-pass",
    "no_passes",
    multiple=True,
    metavar="NAME",
    help="Leave out a graph pass, of docs/performance.md.",
)
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
@ACCEPT_LOSS
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--cache/--no-cache", default=True, show_default=True, help="Take unchanged steps from earlier builds.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr.")
def build_command(
    recipe: str | None,
    output: Path | None,
    stitch: str | None,
    settings: tuple[str, ...],
    outputs: str | None,
    latent: str | None,
    targets: tuple[str, ...],
    precision: str,
    precision_name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a bundle: ONNX file, engine, parity report, manifest.

    RECIPE is a name from `dexport recipes`, or a file with a recipe of your own.
    """
    from dexport.console import Progress, print_result

    hash_ahead(options["checkpoint"])
    with collector_paused():
        from dexport.exporter.build import exit_code
        from dexport.exporter.variant import parse_settings
        from dexport.validate.build import build_and_validate

    if (recipe is None) == (stitch is None):
        raise UsageError("give a recipe, or --stitch", hint="`dexport recipes` lists what can be built")
    if precision_name is not None and "precision" in _given_options() and precision != precision_name:
        _refuse_contradiction([f"--{precision}", f"--precision {precision_name}"])
    with Progress() as progress:
        result = build_and_validate(
            recipe,
            output or Path(Path(recipe).stem if recipe else "stitched"),
            stitch=stitch,
            settings=parse_settings(settings) | ({"outputs": outputs} if outputs else {}),
            latent=_parse_latent(latent),
            targets=_split(targets),
            precision=precision_name or precision,
            listener=progress,
            **options,
        )
    _print_json(result.bundle.manifest) if as_json else print_result(result)
    _say_lossy(result.bundle.acceptable, result.status, result.loss)
    sys.exit(exit_code(result))


@main.command("quantize")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle.")
@quantisation_options
@click.option("--checkpoint", metavar="FILE", help="Where the weights of the build are now, if they were moved.")
@click.option("--recipe", metavar="FILE", help="The recipe file, where the bundle was built from one.")
@click.option("--profile", metavar="FILE", help="The profile, where the bundle was built with a file.")
@click.option("--parity/--no-parity", default=True, show_default=True, help="Compare with PyTorch and gate.")
@ACCEPT_LOSS
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@SIGNED
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr.")
def quantize_command(bundle: Path, output: Path, recipe: str | None, as_json: bool, **options: Any) -> None:
    """Build BUNDLE again with quantised weights: same recipe, size, guidance, precision and engine.

    It takes the checkpoint that BUNDLE was built from, and checks that it is that one.
    """
    from dexport.console import Progress, print_result
    from dexport.exporter.build import exit_code
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.build import quantise_and_validate

    if options["ternary_carrier"] == "auto":
        del options["ternary_carrier"]
    with Progress() as progress:
        found = find_recipe(recipe) if recipe else None
        result = quantise_and_validate(bundle, output, recipe=found, listener=progress, **options)
    _print_json(result.bundle.manifest) if as_json else print_result(result)
    _say_lossy(result.bundle.acceptable, result.status, result.loss)
    sys.exit(exit_code(result))


EVALUATOR = click.Choice(["inception", "efficientnet-lite0", "pixels"])


FOREIGN = ("output", "recipe", "checkpoints", "seed", "ports", "accept_loss", "as_json")
"""Parameters of ``validate`` that hold for a file that something else made."""
OF_DISTRIBUTION = ("reference", "count", "batch", "evaluator", "evaluator_weights", "work")


def _views(command: Callable[..., None]) -> Callable[..., None]:
    """The options that write a report for other readers."""
    for option, what in (
        ("--html", "as one page that needs nothing else"),
        ("--markdown", "for a pull request"),
        ("--junit", "as JUnit XML for CI"),
    ):
        command = click.option(option, type=OutputPath(), help=f"Write the report {what}.")(command)
    return command


@main.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["op", "forward", "trajectory", "distribution"]),
    default=("op", "forward", "trajectory"),
    show_default=True,
    help="Custom ops, single evaluations, whole sampling runs, distances to real images. Repeatable.",
)
@click.option("-o", "--output", type=OutputPath(), help="Write the report as JSON.")
@_views
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="[PART=]FILE",
    help="Where the weights of the build are now, if they were moved. Repeatable.",
)
@click.option("--recipe", metavar="FILE|NAME", help="The recipe file, where the bundle was built from one.")
@PORT
@click.option(
    "--against",
    multiple=True,
    metavar="[PART=]FILE.py:CLASS",
    help="A PyTorch module of your own as the reference, such as the official code. Repeatable.",
)
@click.option(
    "--classes",
    metavar="N,N",
    help="Class labels: one trajectory each, --count images each. [default: 0,1; all for distribution]",
)
@click.option("--steps", type=STEPS, help="Sampling steps. [default: the system's]")
@click.option("--cfg", "cfg_scale", type=SCALE, help="Guidance scale, 1 for none. [default: the system's]")
@click.option("--sampler", metavar="NAME", help="ddpm or ddim, where the model fits. [default: the system's]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the noise.")
@click.option("--reference", type=click.Path(path_type=Path), help="distribution: real images, as `dexport fid` has B.")
@click.option("--count", type=COUNT, default=10, show_default=True, help="distribution: images per class.")
@click.option("--batch", type=BATCH, default=8, show_default=True, help="distribution: images that are made together.")
@click.option("--evaluator", type=EVALUATOR, default="inception", show_default=True, help="distribution: the features.")
@click.option(
    "--evaluator-weights", type=click.Path(path_type=Path), help="distribution: file of the evaluator's weights."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="distribution: folder where a run that was killed goes on. [default: BUNDLE.validation]",
)
@click.option("--fail-under", multiple=True, metavar="NAME=N", help="Smallest snr, psnr, ssim, cosine. Repeatable.")
@click.option(
    "--fail-over",
    multiple=True,
    metavar="NAME=N",
    help="Largest relative_l2, fid_delta, kid_delta, ... Repeatable. [default: by recipe and precision]",
)
@click.option("--baseline", type=click.Path(path_type=Path), help="Fail where a figure falls behind this file.")
@click.option(
    "--accept-loss", is_flag=True, help="Exit with 0 although more is lost than is fit to ship; the report says so."
)
@click.option("--record/--no-record", default=True, show_default=True, help="Put the summary into the manifest.")
@SIGNED
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; progress goes to stderr.")
def validate_command(
    bundle: Path,
    output: Path | None,
    junit: Path | None,
    markdown: Path | None,
    html: Path | None,
    levels: tuple[str, ...],
    checkpoints: tuple[str, ...],
    against: tuple[str, ...],
    recipe: str | None,
    ports: tuple[str, ...],
    classes: str | None,
    reference: Path | None,
    count: int,
    batch: int,
    evaluator: str,
    evaluator_weights: Path | None,
    work: Path | None,
    fail_under: tuple[str, ...],
    fail_over: tuple[str, ...],
    baseline: Path | None,
    record: bool,
    require_signature: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare a bundle with the PyTorch networks that it was built from; exit with 1 where a gate fails.

    BUNDLE may also be an ONNX file that something else made; then --recipe NAME says what it should compute, and
    --checkpoint of which weights. Only single evaluations are compared.
    """
    given = _given_options()
    if bundle.suffix == ".onnx":
        refused = [option for name, option in given.items() if name not in FOREIGN]
        if refused:
            raise UsageError(f"{', '.join(refused)} is for bundles, and {bundle} is none", hint="leave it out")
        sys.exit(
            _validate_foreign(
                bundle,
                output,
                recipe,
                checkpoints,
                ports=_parse_ports(ports),
                seed=options["seed"],
                accept_loss=options["accept_loss"],
                as_json=as_json,
            )
        )
    if ports:
        raise UsageError(f"--port is for ONNX files, and {bundle} is a bundle", hint="leave it out")
    from dexport.bundle import change_manifest, check_changeable, load_bundle
    from dexport.console import Progress, print_validation
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.gates import parse_limits
    from dexport.validate.report.baseline import read_baseline
    from dexport.validate.report.document import summary
    from dexport.validate.report.views import write_views
    from dexport.validate.validate import Distribution, validate

    unused = [given[name] for name in OF_DISTRIBUTION if name in given]
    if unused and "distribution" not in levels:
        raise UsageError(f"{', '.join(unused)}: the level distribution does not run", hint="add --level distribution")
    opened = load_bundle(bundle, require_signature)
    if record:
        check_changeable(opened)
    with Progress() as progress:
        progress.start("validate")
        result = validate(
            opened,
            levels if "levels" in given else None,
            checkpoints=_by_part(checkpoints),
            recipe=find_recipe(recipe) if recipe else None,
            against=_by_part(against),
            labels=None if classes is None else _parse_numbers(classes, "--classes", "0,1", int),
            distribution=Distribution(reference, evaluator, evaluator_weights, count, batch, work),
            limits=parse_limits(fail_under, fail_over),
            baseline=read_baseline(baseline) if baseline else None,
            on_progress=progress.advance,
            **options,
        )
    report = result.to_json()
    if output is not None:
        write_whole(output, json.dumps(report, indent=2) + "\n")
    write_views(report, junit=junit, markdown=markdown, html=html)
    if record:
        change_manifest(opened, validation=summary(report))
    _print_json(report) if as_json else print_validation(result)
    _say_lossy(result.acceptable, result.verdict, result.loss)
    sys.exit(0 if result.acceptable else GateError.exit_code)


@main.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle or ONNX file with the same inputs.")
@click.option("--recipe", metavar="FILE|NAME", help="The recipe, where BUNDLE is an ONNX file or was built from one.")
@click.option("--checkpoint", metavar="FILE", help="Where the weights of the build are now, if they were moved.")
@PORT
@click.option("--batch", "batches", multiple=True, type=BATCH, help="Repeatable. [default: the profile's]")
@click.option("--threads", type=THREADS, help="Of the CPU, for every side. [default: one per core]")
@click.option(
    "--rounds",
    type=ROUNDS,
    default=7,
    show_default=True,
    help="Evaluations of each side, which take turns.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What runs ONNX files. An engine runs wherever it can.",
)
@click.option("--fail-under", multiple=True, metavar="NAME=N", help="Smallest speedup, speedup_against. Repeatable.")
@click.option("--fail-over", multiple=True, metavar="NAME=N", help="Largest wall_ms.")
@SIGNED
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def bench_command(
    bundle: Path,
    fail_under: tuple[str, ...],
    fail_over: tuple[str, ...],
    ports: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Time one evaluation of a bundle, beside PyTorch eager in float32; exit with 1 where a gate does not pass.

    BUNDLE may also be an ONNX file that something else made; then --recipe NAME says what it computes.
    """
    from dexport.console import Progress, print_bench
    from dexport.validate.bench.bench import bench
    from dexport.validate.gates import OF_BENCH, parse_limits

    limits = parse_limits(fail_under, fail_over, OF_BENCH)
    with Progress() as progress:
        progress.start("bench")
        report = bench(bundle, limits=limits, ports=_parse_ports(ports), on_progress=progress.advance, **options)
    _print_json(report.to_json()) if as_json else print_bench(report)
    sys.exit(0 if report.passed else GateError.exit_code)


@main.command("diff")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--checkpoint", metavar="FILE", help="Where the weights of the build are now, if they were moved.")
@click.option("--recipe", metavar="FILE", help="The recipe file, where the bundle was built from one.")
@click.option(
    "--states",
    type=click.Choice(["example", "trajectory"]),
    default="example",
    show_default=True,
    help="Inputs: the recipe's examples, or states of a short sampling run with PyTorch.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the inputs.")
@click.option("--fix", is_flag=True, help="Where rounding or overflow is at fault, build again with the islands found.")
@click.option("--profile", metavar="FILE", help="The profile's file for --fix, where the bundle was built with one.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of that bundle. [default: BUNDLE-fixed]")
@SIGNED
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def diff_command(
    bundle: Path,
    other: Path | None,
    checkpoint: str | None,
    recipe: str | None,
    fix: bool,
    profile: str | None,
    output: Path | None,
    require_signature: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the first block that computes something wrong, and the operation in it.

    BUNDLE is compared with PyTorch; or OTHER, a bundle of the same network, with BUNDLE. Exit with 1 where something is
    found.
    """
    from dexport.bundle import load_bundle
    from dexport.console import Progress, print_diff, print_result
    from dexport.exporter.rebuild import recorded_options
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.compare.diff import diff, refuse_stitched
    from dexport.validate.compare.fix import fixing_islands, rebuild

    if output is not None and not fix:
        raise UsageError("-o needs --fix: nothing else is written", hint="add --fix")
    if profile is not None and not fix:
        raise UsageError("--profile needs --fix: nothing else is built", hint="add --fix")
    if fix and other is not None:
        raise UsageError("--fix is for one bundle", hint=f"dexport diff {other} --fix")
    place = bundle.absolute()
    target = output or place.with_name(f"{place.name}-fixed")
    if fix and target.exists():
        raise UsageError(f"{target} exists already", hint="choose another folder with -o")
    loaded, chosen = load_bundle(bundle, require_signature), find_recipe(recipe) if recipe else None
    refuse_stitched(loaded)
    recorded = recorded_options(loaded, target, checkpoint, chosen, profile) if fix else None
    with Progress() as progress:
        progress.start("diff")
        result = diff(
            loaded,
            load_bundle(other, require_signature) if other else None,
            checkpoint=checkpoint,
            recipe=chosen,
            on_progress=progress.advance,
            **options,
        )
    _print_json(result.to_json()) if as_json else print_diff(result)
    if recorded is not None:
        with Progress() as progress:
            rebuilt = rebuild(*recorded, fixing_islands(result), progress)
        if not as_json:
            print_result(rebuilt)
    sys.exit(0 if result.passed else GateError.exit_code)


@main.command("report")
@click.argument("report", type=click.Path(path_type=Path))
@_views
@click.option("--baseline", type=click.Path(path_type=Path), help="Compare with this file.")
def report_command(
    report: Path, junit: Path | None, markdown: Path | None, html: Path | None, baseline: Path | None
) -> None:
    """Show a stored report of `dexport validate` in other forms; exit with 1 where a gate failed.

    Without an option, Markdown is printed.
    """
    from dexport.validate.report import views
    from dexport.validate.report.baseline import check_same, judged, read_baseline
    from dexport.validate.report.document import acceptable, read_report

    content = read_report(report)
    if baseline is not None:
        held = read_baseline(baseline)
        check_same(held, content)
        content = judged(content, held)
    views.write_views(content, junit=junit, markdown=markdown, html=html)
    if not any((junit, markdown, html)):
        click.echo(views.markdown(content), nl=False)
    sys.exit(0 if acceptable(content) else GateError.exit_code)


@main.group("baseline")
def baseline_group() -> None:
    """Files that hold what a validation measured, for later ones to be held to."""


@baseline_group.command("update")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OutputPath(), required=True, help="The baseline's file, to commit.")
def baseline_update_command(source: Path, output: Path) -> None:
    """Write the baseline of a validation: SOURCE is a stored report, or a bundle whose manifest records one."""
    from dexport.validate.report.baseline import update

    written = update(source, output)
    click.echo(f"{output}: {len(written.content['metrics'])} metrics of {written.content['date']}")


@main.command("sample")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    default=Path("samples.png"),
    show_default=True,
    help="PNG file of the labelled grid; the pictures go to a folder beside it.",
)
@click.option("--classes", metavar="N,N", help="Class labels. [default: the first ten]")
@click.option("--count", type=COUNT, default=1, show_default=True, help="Pictures per class.")
@click.option("--steps", type=STEPS, help="Sampling steps. [default: the system's]")
@click.option("--cfg", "cfg_scale", type=SCALE, help="Guidance scale, 1 for none. [default: the system's]")
@click.option("--sampler", metavar="NAME", help="ddpm or ddim, where the model fits. [default: the system's]")
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Seed of the noise; each picture has its own stream."
)
@click.option("--batch", type=BATCH, default=8, show_default=True, help="Pictures that are made together.")
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
@SIGNED
@click.option("--force", is_flag=True, help="Replace samples of another run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def sample_command(
    bundle: Path,
    provider: str,
    decoder: Path | None,
    require_signature: Path | None,
    classes: str | None,
    fraction: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate images with a bundle: a labelled grid, and every picture.

    Needs neither torch nor onnx. A run that was interrupted makes the missing pictures only.
    """
    from dexport.console import Progress, print_generated, warn
    from dexport.runtime.generate import check_request, generate
    from dexport.runtime.pipeline import Pipeline
    from dexport.runtime.stitch import halves

    request = {
        "classes": _parse_numbers(classes or "", "--classes", "207,360", int),
        "fractions": () if fraction is None else halves(fraction),
        **options,
    }
    force = request.pop("force")
    with Progress() as progress:
        progress.start("sample")
        check = partial(check_request, **request)
        pipeline = Pipeline.open(bundle, provider, decoder, require_signature, check=check)
        warn(pipeline.bundle)
        generated = generate(pipeline, **request, force=force, on_progress=progress.advance)
    _print_json(vars(generated)) if as_json else print_generated(generated)


@main.command("sweep")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    default=Path("sweep.json"),
    show_default=True,
    help="JSON file; the plot goes beside it, as PNG.",
)
@click.option("--fractions", default="0,0.2,0.4,0.6,0.8,1", show_default=True, help="Shares of the first denoiser.")
@click.option("--reference", type=click.Path(path_type=Path), help="Real images: an .npz with arr_0 (N,H,W,C) uint8.")
@click.option("--count", type=COUNT, default=1, show_default=True, help="Pictures per class.")
@click.option("--steps", type=STEPS, help="Sampling steps. [default: the system's]")
@click.option("--cfg", "cfg_scale", type=SCALE, help="Guidance scale, 1 for none. [default: the system's]")
@click.option("--sampler", metavar="NAME", help="ddpm or ddim, where the model fits. [default: the system's]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the noise, the same at every share.")
@click.option("--batch", type=BATCH, default=8, show_default=True, help="Pictures that are made together.")
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True)
@click.option("--decoder", type=click.Path(path_type=Path), help="A decoder's bundle, where BUNDLE brings none.")
@SIGNED
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def sweep_command(
    bundle: Path,
    output: Path,
    fractions: str,
    reference: Path | None,
    provider: str,
    decoder: Path | None,
    require_signature: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Stitch two denoisers at several shares: what it costs, and how far the images move."""
    from dexport.console import Progress, print_sweep, warn
    from dexport.optional import optional_import
    from dexport.runtime.pipeline import Pipeline
    from dexport.validate.distances import load_images
    from dexport.validate.stitch_sweep import plot, sweep

    optional_import("matplotlib")  # the plot comes last
    with Progress() as progress:
        progress.start("sweep")
        shares = _parse_numbers(fractions, "--fractions", "0,0.4,1", float)
        check_place(output.with_suffix(".png"))
        real = load_images(reference) if reference else None
        pipeline = Pipeline.open(bundle, provider, decoder, require_signature)
        warn(pipeline.bundle)
        result = sweep(
            pipeline,
            shares,
            reference=real,
            on_progress=progress.advance,
            **options,
        )
    plot(result, output.with_suffix(".png"))
    write_whole(output, json.dumps(result.to_json(), indent=2) + "\n")
    _print_json(result.to_json()) if as_json else print_sweep(result, output)


@main.command("pack")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The archive. [default: BUNDLE.dexport]")
@click.option(
    "--sign",
    "sign_key",
    type=click.Path(path_type=Path),
    metavar="KEY.pem",
    help="Sign the manifest, which hashes every file, with this private ed25519 key.",
)
@click.option(
    "--triton",
    "repository",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of an archive: models of the Triton Inference Server, in this model repository.",
)
@click.option("--force", is_flag=True, help="Replace an existing archive, or the bundle's models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def pack_command(
    bundle: Path, output: Path | None, sign_key: Path | None, repository: Path | None, force: bool, as_json: bool
) -> None:
    """Write a bundle as one file, the same bytes every time; `dexport unpack` checks it and gives the folder back.

    Or, with --triton, as models of the Triton Inference Server: the denoiser, and a pipeline that makes pictures.
    """
    from dexport.archive import SUFFIX, pack
    from dexport.console import Progress, print_models, print_packed
    from dexport.model_repository import pack_for_triton

    if repository is not None:
        if output is not None or sign_key is not None:
            raise UsageError("--triton writes no archive", hint="leave out -o and --sign")
        models = pack_for_triton(bundle, repository, force=force)
        _print_json(vars(models)) if as_json else print_models(models)
        return
    with Progress() as progress:
        progress.start("pack")
        packed = pack(
            bundle,
            output or Path(f"{bundle.absolute().name}{SUFFIX}"),
            sign_key=sign_key,
            force=force,
            on_progress=progress.advance,
        )
    facts = {"archive": packed.path, "bytes": packed.bytes, "key": packed.key}
    _print_json(facts) if as_json else print_packed(packed)


@main.command("unpack")
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle. [default: its stem]")
@SIGNED
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr.")
def unpack_command(
    archive: Path, output: Path | None, require_signature: Path | None, force: bool, as_json: bool
) -> None:
    """Check every byte of an archive, then give the bundle's folder back."""
    from dexport.archive import unpack
    from dexport.console import Progress

    with Progress() as progress:
        progress.start("unpack")
        bundle = unpack(
            archive,
            output or Path(archive.stem),
            require_signature=require_signature,
            force=force,
            on_progress=progress.advance,
        )
    _print_json(bundle.manifest) if as_json else click.echo(f"{bundle.path}: unpacked, hashes verified")


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
@click.option("--save-stats", type=OutputPath(), help="Write A's statistics in ADM's layout; without B.")
@click.option("--batch", type=BATCH, default=32, show_default=True, help="Images that are evaluated together.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of subsets, splits and the floor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; progress goes to stderr.")
def fid_command(a: Path, b: Path | None, save_stats: Path | None, seed: int, as_json: bool, **options: Any) -> None:
    """Distances of images A to a reference B: FID, sFID, KID, precision and recall, and the floor they stand on.

    A and B are folders of PNG, JPEG and WebP files, .npz files of images (arr_0), or ADM's reference statistics.
    """
    from dexport.console import Progress, print_fid, print_saved_statistics
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
        _print_json(facts) if as_json else print_saved_statistics(facts)
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
@click.option(
    "--keep-gb",
    type=GIGABYTES,
    default=0.0,
    show_default=True,
    help="Keep this much.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache_prune_command(keep_gb: float, as_json: bool) -> None:
    """Remove entries, the least recently used first."""
    from dexport.exporter.cache import LockedError, existing_cache

    cache = existing_cache()
    try:
        removed = cache.prune(int(keep_gb * 1e9))
    except LockedError as error:
        raise MachineError(str(error), hint="end that process") from error
    if as_json:
        _print_json([vars(entry) for entry in removed])
    else:
        click.echo(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e9:.2f} GB")


def _say_lossy(acceptable: bool, status: str, loss: Loss) -> None:
    """Why a command ends with 1 although no gate failed."""
    if status == LOSSY and not acceptable:
        click.secho(f"error: more is lost than is fit to ship: {lossy_text(loss)}", fg="red", err=True)
        click.echo(f"fix: quantise less, such as --budget 'snr>={SHIPPABLE_SNR_DB:g}'; or {ACCEPT}", err=True)


def _validate_foreign(
    model: Path,
    output: Path | None,
    recipe: str | None,
    checkpoints: tuple[str, ...],
    *,
    ports: dict[str, str],
    seed: int,
    accept_loss: bool,
    as_json: bool,
) -> int:
    if recipe is None or len(checkpoints) > 1:
        raise UsageError(
            f"{model} says neither what it should compute nor of which weights",
            hint=f"dexport validate {model} --recipe NAME --checkpoint FILE",
        )
    from dexport.console import Progress, print_parity
    from dexport.exporter.recipes import find_recipe
    from dexport.validate.onnx_file.foreign import validate_foreign

    with Progress() as progress:
        progress.start("validate")
        checkpoint = checkpoints[0] if checkpoints else None
        report = validate_foreign(
            model, find_recipe(recipe), checkpoint, ports=ports, seed=seed, on_progress=progress.advance
        )
    if output is not None:
        write_whole(output, json.dumps(report.to_json(), indent=2) + "\n")
    _print_json(report.to_json()) if as_json else print_parity(report, str(model))
    acceptable = report.passed or (accept_loss and report.status == LOSSY)
    _say_lossy(acceptable, report.status, report.loss)
    return 0 if acceptable else GateError.exit_code


def _parse_ports(texts: tuple[str, ...]) -> dict[str, str]:
    """``("x=sample",)`` -> ``{"x": "sample"}``."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, there = text.partition("=")
        if not (name and equals and there):
            raise UsageError(f"--port {text!r} is not NAME=NAME", hint="for example --port x=sample")
        if name in found:
            raise UsageError(f"--port gives {name} twice", hint="give each once")
        found[name] = there
    return found


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
    if not (x and height.isdecimal() and width.isdecimal()) or max(len(height), len(width)) > LONGEST_NUMBER:
        raise UsageError(f"--latent {limits.shown(text)} is not HEIGHTxWIDTH", hint="for example --latent 8x20")
    return int(height), int(width)


def _parse_numbers(text: str, option: str, example: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UsageError(
            f"{option} {limits.shown(text)} is not a list of numbers", hint=f"for example {option} {example}"
        ) from error


def _by_part(texts: tuple[str, ...]) -> dict[str, str]:
    """``("decoder=vae.pt",)`` -> ``{"decoder": "vae.pt"}``; a bundle that holds one network has the part ``""``.

    A file that is there, such as ``lr=1/w.pt``, or one with a class behind it, is no part and a file.
    """
    found: dict[str, str] = {}
    for text in texts:
        part, equals, value = text.partition("=")
        if not equals or Path(text).exists() or Path(text.rpartition(":")[0]).is_file():
            part, value = "", text
        if part in found:
            raise UsageError(f"{found[part]} and {value}: one part is given twice", hint="name other parts: PART=...")
        found[part] = value
    return found


def _refuse_contradiction(given: Sequence[str]) -> None:
    """Refuse options of which only one can hold; the same one twice is no contradiction."""
    different = list(dict.fromkeys(given))
    if len(different) > 1:
        raise UsageError(f"{' and '.join(different)} exclude each other", hint="give one of them")


def _given_options() -> dict[str, str]:
    """Parameters of the running command that its caller gave, with their options."""
    context = click.get_current_context()
    return {
        str(parameter.name): parameter.opts[-1]
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))
