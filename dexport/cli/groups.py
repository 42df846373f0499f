"""The option groups: what several commands take, and the values that they get for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dexport.choices import (
    AUTO,
    CARRIERS,
    FLAVOURS,
    GUIDANCE,
    OUTPUTS,
    PLUGINS,
    PRECISIONS,
    PROVIDERS,
)
from dexport.cli.headings import Decorator, Option, expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import (
    BATCH,
    CALIBRATION_IMAGES,
    COUNT,
    PATH,
    PIXELS,
    SCALE,
    SEED,
    STEPS,
    OutputPath,
    choice,
    parse_numbers,
    refuse_contradiction,
    require_signature,
    split_commas,
)
from dexport.cli.quantize_spec import Scheme, parse_specs
from dexport.cli.roles import DENOISER, checkpoints_by_role
from dexport.errors import UsageError
from dexport.limits import shown

LONGEST_NUMBER = 9
"""Digits of a side, which keeps the product of two in bounds as well."""


@dataclass(frozen=True)
class Weights:
    """Where weights come from.

    Attributes:
        checkpoints: addresses by role.
        seed: of random weights.
    """

    checkpoints: dict[str, str]
    init_from: str | None
    seed: int

    @property
    def main(self) -> str | None:
        """The checkpoint of the network that the recipe names."""
        return self.checkpoints.get(DENOISER)


def _weights(checkpoints: tuple[str, ...], init_from: str | None, seed: int) -> Weights:
    return Weights(checkpoints_by_role(checkpoints), init_from, seed)


WEIGHTS = OptionGroup(
    "weights",
    "Weights",
    _weights,
    (
        option(
            "--checkpoint",
            "checkpoints",
            multiple=True,
            metavar="[ROLE=]FILE|HUB",
            help="A file, hf://owner/name/file, or owner/name on the Hub; decoder=FILE for the decoder. Without: "
            "seeded random weights.",
        ),
        expert_option(
            "--init-from",
            metavar="FILE|HUB",
            help="Inherit from another model's checkpoint what the recipe allows (LiT from DiT: all but attention).",
        ),
        expert_option("--seed", type=SEED, default=0, show_default=True, help="Seed of random weights."),
    ),
)


@dataclass(frozen=True)
class Network:
    """What the network is.

    Attributes:
        settings: ``NAME=VALUE`` of constructor arguments.
        latent: (height, width) of the spatial input.
        image_size: in pixels.
        stitch: several denoisers, in place of a recipe.
    """

    settings: tuple[str, ...]
    outputs: str | None
    image_size: int | None
    latent: tuple[int, int] | None
    stitch: str | None
    with_decoder: bool


def _network(latent: str | None, **values: Any) -> Network:
    return Network(latent=_parse_latent(latent), **values)


def _parse_latent(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()) or max(len(height), len(width)) > LONGEST_NUMBER:
        raise UsageError(f"--latent {shown(text)} is not HEIGHTxWIDTH", hint="for example --latent 8x20")
    return int(height), int(width)


NETWORK = OptionGroup(
    "network",
    "Network",
    _network,
    (
        option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="A constructor argument, such as hidden_size=384. Repeatable.",
        ),
        option("--image-size", type=PIXELS, metavar="PIXELS", help="Side of the square image."),
        option("--latent", metavar="HxW", help="Spatial size of the network's input, such as 8x20."),
        expert_option(
            "--outputs",
            type=choice(*OUTPUTS),
            help="all: also what the branches of lower resolution predict, where a model has branches (DiMR).",
        ),
        option(
            "--stitch",
            metavar="NAME[=CHECKPOINT]:SHARE,...",
            help="Instead of RECIPE: several denoisers, noisiest first, with their shares of the trajectory. "
            "NAME is a recipe, or the folder of a bundle.",
        ),
        option(
            "--with-decoder/--without-decoder", default=False, help="Put the decoder of the latents into the bundle."
        ),
    ),
)


@dataclass(frozen=True)
class Graph:
    """How the network is traced."""

    guidance: str
    fold_steps: int | None
    opset: int
    no_passes: tuple[str, ...]


GRAPH = OptionGroup(
    "graph",
    "Graph",
    Graph,
    (
        option(
            "--guidance",
            type=choice(*GUIDANCE),
            default=GUIDANCE[0],
            show_default=True,
            help="fused: the graph applies the system's own guidance.",
        ),
        option(
            "--fold-steps",
            type=STEPS,
            metavar="STEPS",
            help="Compute what depends on time alone now, for the times of so many sampling steps; the bundle takes "
            "no others.",
        ),
        expert_option("--opset", type=click.INT, default=23, show_default=True, help="ONNX opset."),
        expert_option(
            "--no-pass",
            "no_passes",
            multiple=True,
            metavar="NAME",
            help="Leave out a graph pass, of docs/performance.md. Repeatable.",
        ),
    ),
)


@dataclass(frozen=True)
class Precision:
    """The type that the network computes in, and the modules that stay in float32."""

    precision: str
    islands: tuple[str, ...]


def _precision(precision: str, islands: tuple[str, ...], **flags: bool) -> Precision:
    short = [name for name, given in flags.items() if given]
    said = [f"--{name}" for name in short]
    source = click.get_current_context().get_parameter_source("precision")
    if source is ParameterSource.COMMANDLINE and precision not in short:
        said.append(f"--precision {precision}")
    if short:
        refuse_contradiction(said)
    return Precision(short[0] if short else precision, islands)


PRECISION = OptionGroup(
    "precision",
    "Precision",
    _precision,
    (
        option(
            "--precision",
            type=choice(*PRECISIONS, AUTO),
            default=PRECISIONS[0],
            show_default=True,
            help=f"What it computes in, around float32 islands; {', '.join(f'--{name}' for name in PRECISIONS)} say it "
            "in short. auto: float16 but for modules that it cannot hold, found by sampling with PyTorch.",
        ),
        *(option(f"--{name}", is_flag=True, hidden=True, help=f"Short for --precision {name}.") for name in PRECISIONS),
        option(
            "--island",
            "islands",
            multiple=True,
            metavar="PATTERN",
            help="Keep a module in float32, such as 'final_layer' or 'blocks.2*'. Repeatable.",
        ),
    ),
)


@dataclass(frozen=True)
class Quantization:
    """Fewer bits, and the sampling that they are calibrated on."""

    scheme: Scheme
    ternary_carrier: str
    calibration_images: int
    calibration_seed: int


def _quantization(specs: tuple[str, ...], **values: Any) -> Quantization:
    return Quantization(parse_specs(specs), **values)


QUANTIZATION = OptionGroup(
    "quantization",
    "Quantization",
    _quantization,
    (
        option(
            "--quantize",
            "specs",
            multiple=True,
            metavar="SPEC",
            help="int8: weights only. w8a8: activations too. ternary: rounds the weights, which loses a lot. map=FILE: "
            "a scheme for each layer, from JSON or a bundle's manifest.json. budget=snr>=25,size<=0.3: schemes are "
            "chosen for an SNR (dB, after 20 steps), a share of the float file (or size<=2.5MB), or both. none: layers "
            "that are ternary by construction are stored dense. Repeatable.",
        ),
        expert_option(
            "--calibration-images",
            type=CALIBRATION_IMAGES,
            default=32,
            show_default=True,
            help="Sampled to calibrate on.",
        ),
        expert_option("--calibration-seed", type=SEED, default=0, show_default=True, help="Seed of their noise."),
        expert_option(
            "--ternary-carrier",
            type=choice(AUTO, *CARRIERS),
            default=AUTO,
            show_default=True,
            help="How ternary layers are stored: packed is the smallest, int4 is for TensorRT, nbits for ONNX Runtime "
            "only. auto: int4 for an engine, else the fastest exact one measured in ONNX Runtime, or packed where it "
            "rounds.",
        ),
    ),
)


@dataclass(frozen=True)
class Engine:
    """The TensorRT engine, if any, and the batches that the bundle is for."""

    trt: bool
    engine: str
    targets: tuple[str, ...]
    plugins: str
    profile: str


def _engine(targets: tuple[str, ...], **values: Any) -> Engine:
    return Engine(targets=split_commas(targets), **values)


def _profile_help() -> str:
    from dexport.profiles import builtin_profiles

    return f"Batch range: {', '.join(builtin_profiles())}, or a TOML file."


class ProfileOption(Option):
    """Its help lists the built-in profiles, which are looked up when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = _profile_help()
        return super().get_help_record(ctx)


ENGINE = OptionGroup(
    "engine",
    "Engine",
    _engine,
    (
        option("--trt/--no-trt", default=False, help="Build a TensorRT engine as well."),
        expert_option(
            "--engine",
            type=choice(AUTO, *FLAVOURS),
            default=AUTO,
            show_default=True,
            help="auto: tensorrt where there is a GPU and the package, else tensorrt-rtx.",
        ),
        option(
            "--target",
            "targets",
            multiple=True,
            metavar="SM[,SM]",
            help="GPU architectures, such as sm80,sm89,sm120. Repeatable.",
        ),
        expert_option(
            "--plugins",
            type=choice(*PLUGINS),
            default=PLUGINS[0],
            show_default=True,
            help="Plugin kernels in tensorrt engines (TensorRT-RTX has none); the ONNX file has function bodies either "
            "way.",
        ),
        option(
            "--profile",
            cls=ProfileOption,
            default="latency",
            show_default=True,
            metavar="NAME|FILE",
            help="Batch range: a name, or a TOML file.",
        ),
    ),
)


@dataclass(frozen=True)
class Output:
    """Where the bundle goes, and what is asked of it."""

    output: Path | None
    parity: bool
    accept_loss: bool
    force: bool
    as_json: bool
    cache: bool = True


parity = option("--parity/--no-parity", default=True, show_default=True, help="Compare with PyTorch and gate.")
accept_loss = option(
    "--accept-loss/--no-accept-loss",
    default=False,
    help="Exit with 0 although more is lost than is fit to ship; the manifest keeps that it was accepted.",
)
accept_loss_of_report = option(
    "--accept-loss", is_flag=True, help="Exit with 0 although more is lost than is fit to ship; the report says so."
)
force = option("--force", is_flag=True, help="Replace an existing bundle.")
manifest_as_json = option(
    "--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr."
)
OUTPUT = OptionGroup(
    "output",
    "Output",
    Output,
    (
        option("-o", "--output", type=PATH, help="Folder of the bundle. [default: RECIPE]"),
        parity,
        accept_loss,
        force,
        expert_option(
            "--cache/--no-cache", default=True, show_default=True, help="Take unchanged steps from earlier builds."
        ),
        manifest_as_json,
    ),
)
NEW_BUNDLE = OptionGroup(
    "output",
    "Output",
    Output,
    (
        option("-o", "--output", type=PATH, required=True, help="Folder of the new bundle."),
        parity,
        accept_loss,
        force,
        manifest_as_json,
    ),
)


@dataclass(frozen=True)
class Recorded:
    """Where the things are that a bundle was built from; its manifest records all else."""

    checkpoint: str | None
    recipe: str | None
    profile: str | None = None


recorded_checkpoint = option(
    "--checkpoint", metavar="FILE", help="Where the weights of the build are now, if they were moved."
)
recorded_recipe = option("--recipe", metavar="FILE", help="The recipe file, where the bundle was built from one.")


def recorded(profile: Decorator) -> OptionGroup:
    """The options of a command that builds a bundle again; ``profile`` adds ``--profile``."""
    return OptionGroup(
        "recorded", "What BUNDLE was built from", Recorded, (recorded_checkpoint, recorded_recipe, profile)
    )


@dataclass(frozen=True)
class Sampling:
    """How trajectories are sampled; None is the system's own."""

    steps: int | None
    cfg_scale: float | None
    sampler: str | None
    seed: int
    classes: tuple[int, ...] | None = None
    count: int = 1
    batch: int = 8


def _sampling(classes: str | None = None, **values: Any) -> Sampling:
    labels = None if classes is None else tuple(parse_numbers(classes, "--classes", "0,1", int))
    return Sampling(classes=labels, **values)


def class_labels(text: str) -> Decorator:
    """``--classes``, with this help."""
    return option("--classes", metavar="N,N", help=text)


pictures = (
    option("--count", type=COUNT, default=1, show_default=True, help="Pictures per class."),
    option("--batch", type=BATCH, default=8, show_default=True, help="Pictures that are made together."),
)


def sampling(*more: Decorator, seed: str = "Seed of the noise.") -> OptionGroup:
    """The options of a command that samples.

    Args:
        more: those that not every such command has, of :func:`class_labels` and :data:`pictures`.
        seed: the help of ``--seed``.
    """
    return OptionGroup(
        "sampling",
        "Sampling",
        _sampling,
        (
            *more,
            option("--steps", type=STEPS, help="Sampling steps. [default: the system's]"),
            option("--cfg", "cfg_scale", type=SCALE, help="Guidance scale, 1 for none. [default: the system's]"),
            option(
                "--sampler", metavar="NAME", help="Such as ddpm or ddim, where the model fits. [default: the system's]"
            ),
            option("--seed", type=SEED, default=0, show_default=True, help=seed),
        ),
    )


@dataclass(frozen=True)
class Runtime:
    """What runs the networks of a bundle."""

    provider: str
    decoder: Path | None
    require_signature: Path | None


RUNTIME = OptionGroup(
    "runtime",
    "Running",
    Runtime,
    (
        option(
            "--provider",
            type=choice(*PROVIDERS, FLAVOURS[0]),
            default=PROVIDERS[0],
            show_default=True,
            help="What runs the networks.",
        ),
        option("--decoder", type=PATH, help="A decoder's bundle, where BUNDLE brings none."),
        require_signature,
    ),
)


@dataclass(frozen=True)
class Gates:
    """Limits as they were written, ``NAME=N``."""

    fail_under: tuple[str, ...]
    fail_over: tuple[str, ...]


def gates(under: str, over: str, *more: Decorator, make: Any = Gates) -> OptionGroup:
    """``--fail-under`` and ``--fail-over`` with these helps."""
    return OptionGroup(
        "gates",
        "Gates",
        make,
        (
            option("--fail-under", multiple=True, metavar="NAME=N", help=under),
            option("--fail-over", multiple=True, metavar="NAME=N", help=over),
            *more,
        ),
    )


@dataclass(frozen=True)
class Views:
    """Files that show a report to other readers."""

    junit: Path | None
    markdown: Path | None
    html: Path | None


views = (
    option("--junit", type=OutputPath(), help="Write the report as JUnit XML for CI."),
    option("--markdown", type=OutputPath(), help="Write the report for a pull request."),
    option("--html", type=OutputPath(), help="Write the report as one page that needs nothing else."),
)
