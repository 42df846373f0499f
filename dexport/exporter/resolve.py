"""A recipe and options that fit together: the network to build, with every setting decided."""

from __future__ import annotations

from dataclasses import fields

from dexport import limits
from dexport.errors import UsageError
from dexport.exporter.options import BYTES_PER_WEIGHT, BuildOptions
from dexport.exporter.passes import check_switchable
from dexport.exporter.quantize.request import Asked, check_asked
from dexport.exporter.recipes.recipe import Recipe, value_of
from dexport.exporter.trajectory import with_table
from dexport.exporter.variant import Variant, resolve
from dexport.plugins.functions import MINIMUM_OPSET as FUNCTIONS_OPSET

OLDEST_OPSET = 20
NEWEST_OPSET = 24


def resolve_network(recipe: Recipe, options: BuildOptions, *, part: bool = False) -> Variant:
    """The network that the options describe.

    Args:
        part: of a system whose program runs it.

    Raises:
        UsageError: options that contradict each other or the recipe.
        InputError: a recipe or a signature that is none.
    """
    if options.precision not in BYTES_PER_WEIGHT:
        raise UsageError(f"no precision {options.precision!r}", hint=f"choose from {', '.join(BYTES_PER_WEIGHT)}")
    check_asked(recipe, asked_of(options), part or recipe.has_program)
    check_switchable(options.no_passes)
    if not OLDEST_OPSET <= options.opset <= NEWEST_OPSET:
        raise UsageError(f"opset {options.opset} is not supported", hint=f"{OLDEST_OPSET} to {NEWEST_OPSET}")
    if (options.engine != "auto" or options.targets) and not options.trt:
        raise UsageError("--engine and --target need --trt", hint="add --trt")
    if options.opset < FUNCTIONS_OPSET and recipe.ops:
        raise UsageError(
            f"{recipe.name} uses {', '.join(recipe.ops)}, whose functions need opset {FUNCTIONS_OPSET}",
            hint=f"--opset {FUNCTIONS_OPSET}",
        )
    if options.init_from is not None and options.checkpoint is not None:
        raise UsageError("--checkpoint and --init-from exclude each other", hint="give one of the two")
    if options.islands and options.precision == "fp32" and not asked_of(options).quantises:
        raise UsageError(
            "--island needs --fp16, --bf16 or --quantize: everything is float32 already", hint="add --fp16"
        )
    if options.seed > limits.LARGEST_SEED:
        raise UsageError(f"--seed {limits.shown(options.seed)} is too large", hint=f"up to {limits.LARGEST_SEED}")
    latent = options.latent
    if options.image_size is not None:
        limits.check_whole("--image-size", options.image_size, limits.LARGEST_SIDE, least=-limits.LARGEST_SIDE)
        if latent is not None:
            raise UsageError("--latent and --image-size exclude each other", hint="give one of the two")
        pixels = value_of(recipe.pixels_per_latent, {**recipe.config, **options.settings})
        if not isinstance(pixels, int) or pixels < 1:
            raise UsageError(
                f"{recipe.name}: cells of {limits.shown(pixels)} pixels", hint="give whole numbers above 0 with --set"
            )
        cells, rest = divmod(options.image_size, pixels)
        if rest or cells < 1:
            raise UsageError(
                f"--image-size {options.image_size} is not a positive multiple of {pixels}",
                hint="for example --image-size 256",
            )
        latent = (cells, cells)
    variant = resolve(recipe, options.settings, latent, options.graphs)
    return with_table(variant, options.fold_steps)


def asked_of(options: BuildOptions) -> Asked:
    """What is asked of quantisation."""
    return Asked(**{each.name: getattr(options, each.name) for each in fields(Asked)})
