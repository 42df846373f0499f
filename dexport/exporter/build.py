"""The vertical path: checkpoint -> ONNX -> engine -> verdict -> bundle."""

from __future__ import annotations

import json
import platform
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dexport import limits
from dexport.bundle import (
    DECODER,
    ENGINES,
    MODEL,
    MODEL_DATA,
    PARTS,
    REPORTS,
    Bundle,
    Draft,
    copy_bundle,
    load_bundle,
)
from dexport.drafts import output_folder
from dexport.errors import GateError, UsageError
from dexport.exporter.cache import open_cache
from dexport.exporter.checkpoint import WeightSource, open_weights
from dexport.exporter.custom_ops import REGISTRATION, wants_plugins
from dexport.exporter.describe import count_parameters
from dexport.exporter.engine import EngineChoice, EngineReport, EngineRequest, build_engine, choose_engine
from dexport.exporter.export import Exported, convert, export_onnx
from dexport.exporter.gates import NetworkGates, gates_for
from dexport.exporter.inherit import inherit_weights
from dexport.exporter.latents import check_latents
from dexport.exporter.manifest import Engine, Verdict, compose
from dexport.exporter.passes import check_switchable
from dexport.exporter.passes.precision import DATA_MOVEMENT
from dexport.exporter.ports import check_network, check_program
from dexport.exporter.quantize.calibrate import DEFAULT_IMAGES
from dexport.exporter.quantize.request import Asked, Workplace, check_asked, prepare, request_of
from dexport.exporter.quantize.schemes import gate_of, quantised_layers
from dexport.exporter.quantize.ternary import AUTO, TernaryStorage, choose_storage
from dexport.exporter.ranges import Ranges, find_ranges
from dexport.exporter.recipes import all_recipes, find_recipe, registered_recipe
from dexport.exporter.recipes.recipe import Islands, Recipe, value_of
from dexport.exporter.reuse import (
    Reuse,
    engine_report_from_json,
    exported_from_json,
    facts_of,
    is_built_in,
)
from dexport.exporter.steps import Listener, Silent, StepLog
from dexport.exporter.torch_state import fresh_torch
from dexport.exporter.trace import DEFAULT_OPSET, trace
from dexport.exporter.variant import Variant, resolve
from dexport.files import outside_drafts
from dexport.plugins.functions import MINIMUM_OPSET as FUNCTIONS_OPSET
from dexport.profiles import Profile, load_profile
from dexport.verdict import FAILED, Loss

AUTO_PRECISION = "auto"
BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 2, "bf16": 2, AUTO_PRECISION: 4}
OLDEST_OPSET = 20
NEWEST_OPSET = 24


@dataclass(frozen=True)
class BuildOptions:
    """What to build. Field names follow the command line; see ``dexport build --help``.

    Attributes:
        latent: (height, width) of the spatial input, None for the recipe's.
        image_size: the same in image pixels, for square inputs.
        islands: module patterns kept in float32 on top of the recipe's; INT8 leaves them alone too.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto``: float16 but for what it cannot hold.
        int8: ``weight`` or ``w8a8``; what it leaves alone computes in ``precision``.
        precision_map: a file, or glob patterns of layers -> scheme; see :mod:`dexport.exporter.quantize.schemes`.
        budget: ``snr>=DB``, ``size<=SHARE`` or ``size<=NMB``, or both: schemes are chosen layer by layer to meet it.
        calibration_images, calibration_seed: trajectories that quantisation is calibrated on.
        fold_steps: of the recipe's sampler; what depends on time alone becomes tables of their times.
        no_passes: names of graph passes to leave out; see :data:`dexport.exporter.passes.SWITCHABLE`.
        engine: ``auto``, ``tensorrt`` or ``tensorrt-rtx``; used when ``trt`` is set.
        init_from: checkpoint of another model to inherit from, as far as the recipe allows.
        plugins: ``auto``, ``on`` or ``off``; only TensorRT engines can have plugins.
        ternary: store ternary layers packed, and round those of any other recipe to ternary; None for the former only,
            because that loses nothing.
        ternary_carrier: ``auto`` or a name of :data:`dexport.exporter.quantize.carriers.CARRIERS`.
        targets: compute capabilities; empty for the GPU here, or the profile's.
        profile: name or path.
        parity: whether to compare with PyTorch; without, the bundle says that it was not verified.
        cache: take unchanged steps from earlier builds, and keep this one's for later ones.
        with_decoder: put the decoder of a denoiser's latents into its bundle, from ``decoder_checkpoint``.
        decoder_bundle: a decoder's bundle that is copied instead.
        accept_loss: more may be lost than is fit to ship (:mod:`dexport.verdict`); the manifest keeps that it was said.
    """

    output: Path
    checkpoint: str | None = None
    init_from: str | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    latent: tuple[int, int] | None = None
    image_size: int | None = None
    guidance: str = "none"
    precision: str = "fp32"
    islands: tuple[str, ...] = ()
    int8: str | None = None
    precision_map: str | Path | Mapping[str, str] | None = None
    budget: str | None = None
    calibration_images: int = DEFAULT_IMAGES
    calibration_seed: int = 0
    fold_steps: int | None = None
    opset: int = DEFAULT_OPSET
    no_passes: tuple[str, ...] = ()
    trt: bool = False
    engine: str = "auto"
    targets: tuple[str, ...] = ()
    plugins: str = "auto"
    ternary: bool | None = None
    ternary_carrier: str = AUTO
    profile: str = "latency"
    parity: bool = True
    with_decoder: bool = False
    decoder_checkpoint: str | None = None
    decoder_bundle: Path | None = None
    force: bool = False
    cache: bool = True
    accept_loss: bool = False


@dataclass(frozen=True)
class Case:
    """What a verifier is given.

    Attributes:
        gates: what judges; ``gates.name`` is the precision, or the least exact scheme.
        remembered: the reports of an earlier run on the same case, which are to be believed.
    """

    variant: Variant
    weights: WeightSource
    model_path: Path
    precision: str
    max_batch: int
    gates: NetworkGates
    on_progress: Callable[[int, int, str], None]
    remembered: Mapping[str, str] | None = None


Verifier = Callable[[Case], tuple[Verdict, Mapping[str, str]]]
"""Returns the verdict and the report files by name. Injected, because validation is built on top of the exporter."""


@dataclass(frozen=True)
class BuildResult:
    """The bundle, the verdict on it (None when it was not verified), and those on its parts."""

    bundle: Bundle
    verdict: Verdict | None
    parts: Mapping[str, Verdict | None] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Of the whole: ``passed``, ``lossy``, ``failed`` or ``not verified``; see :mod:`dexport.verdict`."""
        return self.bundle.status

    @property
    def loss(self) -> Loss:
        """What was lost against PyTorch, the worst of the network and of its parts."""
        return self.bundle.loss

    @property
    def caveats(self) -> tuple[str, ...]:
        """What who runs the bundle has to know; empty of one that passed with trained weights."""
        return self.bundle.caveats


@dataclass(frozen=True)
class Sources:
    """The weights of a network and of the decoder that goes with it, opened and checked against both networks."""

    network: WeightSource
    decoder: WeightSource | None = None


@fresh_torch()
def build(
    recipe: str | Recipe,
    options: BuildOptions,
    verify: Verifier,
    listener: Listener | None = None,
    sources: Sources | None = None,
) -> BuildResult:
    """Build a bundle.

    Everything that can be refused is refused before work starts; whatever goes wrong later leaves no bundle behind.
    A failed gate does leave one, marked failed.

    Args:
        sources: weights that are open already; by default those that the options name are opened.

    Raises:
        DexportError: see its subclasses; the command line exits with their codes.
    """
    log = StepLog(listener or Silent())
    options = replace(options, output=output_folder(options.output))
    profile = load_profile(options.profile)
    variant = resolve_options(recipe, options)
    decoder = resolve_decoder(variant, options)
    choice = choose_engine(options.engine, options.targets, profile.targets) if options.trt else None
    plugins = wants_plugins(options.plugins, choice)
    ternary = choose_storage(variant, options.ternary, options.ternary_carrier, choice, plugins)
    if ternary is not None and options.opset < FUNCTIONS_OPSET:
        raise UsageError(
            f"packed ternary weights need opset {FUNCTIONS_OPSET}",
            hint=f"--opset {FUNCTIONS_OPSET}, or --quantize none",
        )
    islands = _islands(variant, options)
    asked = _asked(options)
    request = request_of(variant, asked, ternary, islands.modules, choice, plugins, options.opset)
    place = Workplace(options.output)
    if not is_built_in(variant):  # those agree with their recipes; the trace is held to it all the same
        check_network(variant)
    with Draft(options.output, force=options.force, bytes_needed=_bytes_needed(variant, options, ternary)) as draft:
        with log.step("open weights"):
            opened = sources or open_sources(variant, decoder, options)
        weights = opened.network
        given, ranges = options, None
        if options.precision == AUTO_PRECISION:
            options, ranges = _decide_precision(variant, weights, options, log)
            draft.write_text(f"{REPORTS}/ranges.json", json.dumps(ranges.to_json(), indent=1) + "\n")
            islands = _islands(variant, options)
            request = request_of(variant, asked, ternary, islands.modules, choice, plugins, options.opset)
        quantisation = None
        if request is not None:

            def graph() -> ir.Model:
                traced = trace(variant, weights, opset=options.opset)
                return convert(
                    traced,
                    variant,
                    precision=options.precision,
                    islands=islands,
                    ternary=ternary,
                    without=options.no_passes,
                    quantised=quantised_layers(request.schemes),
                )[0]

            size = BYTES_PER_WEIGHT[options.precision]
            quantisation = prepare(request, variant, weights, place, graph, size, log)
        plugin_target = choice.targets[0] if choice and plugins else None
        reuse = Reuse(
            open_cache() if options.cache and not asked.calibrates and is_built_in(variant) else None,
            f"{variant.recipe.name} {options.precision}",
            draft.path,
            facts_of(variant, weights.origin, options, plugins=plugin_target, ternary=ternary and ternary.describe()),
            log,
            weights.check_unchanged,
        )

        def export() -> Exported:
            return export_onnx(
                variant,
                weights,
                draft.model_path,
                precision=options.precision,
                islands=islands,
                opset=options.opset,
                plugin_target=plugin_target,
                ternary=ternary,
                plan=None if quantisation is None else quantisation.plan,
                without=options.no_passes,
                log=log,
            )

        exported = reuse.step(
            "onnx", export, pack=asdict, unpack=exported_from_json, files=lambda _: (MODEL, MODEL_DATA)
        )
        gate, budget = options.precision, None  # name of the gate, and dB
        if quantisation is not None:
            gate = gate_of(quantisation.plan.schemes.values(), options.precision)
            budget = quantisation.budget["asked_snr_db"] if quantisation.budget is not None else None
            for name, text in quantisation.reports(exported.quantised).items():
                draft.write_text(f"{REPORTS}/{name}", text)
        engine = _build_engine(draft, variant, exported, choice, profile, plugins, reuse) if choice else None
        gates = gates_for(gate, variant.recipe.gates, budget)
        verdict = _verify(draft, variant, weights, options, profile, gates, verify, reuse) if options.parity else None
        parts = {}
        if decoder is not None:
            assert opened.decoder is not None
            inner = decoder_options(draft, decoder, given)
            parts[DECODER] = build(decoder.recipe, inner, verify, listener, Sources(opened.decoder))
        elif options.decoder_bundle is not None:
            copy = draft.path / PARTS / DECODER
            copy_bundle(load_bundle(options.decoder_bundle), copy)
            parts[DECODER] = BuildResult(load_bundle(copy), None)
        weights.check_unchanged()
        with log.step("hash"):
            bundle = draft.commit(
                compose(
                    variant,
                    weights={**asdict(weights.origin), "random": weights.origin.random},
                    precision=options.precision,
                    islands=islands,
                    opset=options.opset,
                    no_passes=options.no_passes,
                    profile=profile,
                    exported=exported,
                    ternary=None if ternary is None else ternary.describe(),
                    engine=engine,
                    verdict=verdict,
                    steps=log.finished,
                    parts={name: part.bundle for name, part in parts.items()},
                    quantisation={"gate": gate, **(quantisation.describe() if quantisation else {})},
                    ranges=None if ranges is None else ranges.summary(options.islands),
                    accept_loss=options.accept_loss,
                )
            )
    if request is not None:
        place.remove()
    return BuildResult(bundle, verdict, {name: part.verdict for name, part in parts.items()})


def resolve_options(recipe: str | Recipe, options: BuildOptions) -> Variant:
    """The variant that the options describe.

    Raises:
        UsageError: options that contradict each other or the recipe.
        InputError: ports that no sampler feeds or reads.
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if options.precision not in BYTES_PER_WEIGHT:
        raise UsageError(f"no precision {options.precision!r}", hint=f"choose from {', '.join(BYTES_PER_WEIGHT)}")
    check_asked(recipe, _asked(options))
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
    if options.islands and options.precision == "fp32" and not _asked(options).quantises:
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
    variant = resolve(recipe, options.settings, latent, options.guidance == "fused", options.fold_steps)
    check_program(variant)
    check_latents(variant)
    return variant


def resolve_decoder(variant: Variant, options: BuildOptions) -> Variant | None:
    """The decoder that goes into a denoiser's bundle, for its latents; None when none was asked for or is needed.

    Raises:
        UsageError: not a denoiser, weights for a decoder that has none, or latents that the decoder does not take.
    """
    if not options.with_decoder:
        if options.decoder_checkpoint is not None:
            raise UsageError("--checkpoint decoder=FILE needs --with-decoder", hint="add --with-decoder")
        return None
    sampling = variant.recipe.sampling
    if sampling is None:
        raise UsageError(f"{variant.recipe.name} is no denoiser and takes no decoder", hint="leave out --with-decoder")
    if sampling.decoder not in all_recipes():  # a pixel shuffle, or nothing: needs no weights
        if options.decoder_checkpoint is not None:
            raise UsageError(
                f"{variant.recipe.name}'s outputs become images by {sampling.decoder!r}, which has no weights",
                hint="leave out --checkpoint decoder=...",
            )
        return None
    decoder = resolve(registered_recipe(sampling.decoder), latent=variant.latent)
    wanted, given = decoder.signature.inputs[0].shape, variant.signature.inputs[0].shape
    if wanted != given:
        raise UsageError(
            f"{sampling.decoder} takes latents {list(wanted)}, {variant.recipe.name} makes {list(given)}",
            hint="leave out --with-decoder and give `dexport sample` a decoder bundle",
        )
    return decoder


def decoder_options(draft: Draft, decoder: Variant, options: BuildOptions) -> BuildOptions:
    """How a decoder is built inside the bundle that it serves."""
    return replace(
        options,
        output=draft.path / PARTS / DECODER,
        checkpoint=options.decoder_checkpoint,
        init_from=None,
        settings={},
        latent=decoder.latent,
        image_size=None,
        guidance="none",
        fold_steps=None,
        islands=(),
        ternary=None,
        ternary_carrier=AUTO,
        int8=None,
        precision_map=None,
        budget=None,
        calibration_images=DEFAULT_IMAGES,
        calibration_seed=0,
        with_decoder=False,
        decoder_checkpoint=None,
        decoder_bundle=None,
        force=False,
    )


def open_sources(variant: Variant, decoder: Variant | None, options: BuildOptions) -> Sources:
    """Open the weights of a network and of its decoder, so that bad ones of either are found before both are built.

    Raises:
        InputError, UsageError, MachineError: as :func:`~dexport.exporter.checkpoint.open_weights`.
    """
    network = _open_weights(variant, options)
    if decoder is None:
        return Sources(network)
    adapt = decoder.recipe.adapt
    return Sources(network, open_weights(options.decoder_checkpoint, decoder.outline, seed=options.seed, adapt=adapt))


def _open_weights(variant: Variant, options: BuildOptions) -> WeightSource:
    if options.init_from is None:
        module, adapt = variant.outline, variant.recipe.adapt
        return open_weights(options.checkpoint, module, seed=options.seed, adapt=adapt)
    return inherit_weights(options.init_from, variant.outline, variant.recipe.not_inherited, options.seed)


def _asked(options: BuildOptions) -> Asked:
    return Asked(**{field.name: getattr(options, field.name) for field in fields(Asked)})


def _islands(variant: Variant, options: BuildOptions) -> Islands:
    """What stays in float32: the recipe's modules and the user's."""
    islands = variant.recipe.islands
    return replace(islands, modules=(*islands.modules, *options.islands))


def _decide_precision(
    variant: Variant, weights: WeightSource, options: BuildOptions, log: StepLog
) -> tuple[BuildOptions, Ranges]:
    """float16, with an island around everything that it cannot hold."""
    with log.step("ranges"):
        ranges = find_ranges(variant, weights, log.listener.advance)
    kept = ranges.islands(_islands(variant, options))
    return replace(options, precision="fp16", islands=(*options.islands, *kept)), ranges


def _bytes_needed(variant: Variant, options: BuildOptions, ternary: TernaryStorage | None) -> int:
    """The weights once for the ONNX file and once for the plan."""
    packed = 0 if ternary is None else ternary.values
    dense = count_parameters(variant) - packed
    stored = dense * BYTES_PER_WEIGHT[options.precision] + (packed * ternary.carrier.bits // 8 if ternary else 0)
    return stored * (2 if options.trt else 1)


def _build_engine(
    draft: Draft,
    variant: Variant,
    exported: Exported,
    choice: EngineChoice,
    profile: Profile,
    plugins: bool,
    reuse: Reuse,
) -> Engine:
    file = f"{ENGINES}/{choice.flavour}-{'-'.join(choice.targets)}.plan"
    kept_log = f"{REPORTS}/engine.log"
    batches = (profile.batch_min, profile.batch_opt, profile.batch_max)
    low, best, high = ({spec.name: spec.dims(b) for spec in variant.signature.inputs} for b in batches)
    request = EngineRequest(
        onnx_path=draft.model_path,
        plan_path=draft.path / file,
        choice=choice,
        shapes={name: (low[name], best[name], high[name]) for name in low},
        expected_dtypes=_decisive(exported),
        workspace_mib=profile.workspace_mib,
        log_path=draft.path / kept_log,
        failed_log=_beside(draft.output),
        plugin_modules=(REGISTRATION,) if plugins else (),
    )
    log = reuse.log

    def run() -> EngineReport:
        with log.step("engine") as step:
            report = build_engine(request, lambda phase, done, total: log.listener.advance(done, total, phase))
            step.peak_rss_bytes = report.peak_rss_bytes
        return report

    if choice.flavour == "tensorrt":  # bound to the GPU and driver here, of which the cache knows nothing
        return Engine(choice, file, run())
    decides = {"choice": asdict(choice), "shapes": request.shapes, "workspace": request.workspace_mib}
    report = reuse.step(
        "engine",
        run,
        pack=asdict,
        unpack=engine_report_from_json,
        files=lambda _: (file, kept_log),
        facts={**decides, "dtypes": request.expected_dtypes},
    )
    return Engine(choice, file, report)


def _beside(output: Path) -> Path:
    """Where the log of an engine that fails is kept, under a name that no other build takes."""
    folder = outside_drafts(output.parent)
    return folder / f"{output.name}.engine-{secrets.token_hex(4)}.log"


def _decisive(exported: Exported) -> dict[str, str]:
    """The nodes whose type is asserted in the built network: those that compute."""
    return {
        name: dtype
        for name, dtype in exported.precisions.items()
        if name.rpartition("/")[2].rstrip("_0123456789") not in DATA_MOVEMENT
    }


def _verify(
    draft: Draft,
    variant: Variant,
    weights: WeightSource,
    options: BuildOptions,
    profile: Profile,
    gates: NetworkGates,
    verify: Verifier,
    reuse: Reuse,
) -> Verdict:
    log = reuse.log
    case = Case(variant, weights, draft.model_path, options.precision, profile.batch_max, gates, log.listener.advance)

    def run() -> tuple[Verdict, Mapping[str, str]]:
        with log.step("parity"):
            verdict, reports = verify(case)
            for name, text in reports.items():
                draft.write_text(f"{REPORTS}/{name}", text)
        return verdict, reports

    verdict, _ = reuse.step(
        "parity",
        run,
        pack=lambda result: dict(result[1]),
        unpack=lambda reports: verify(replace(case, remembered=reports)),
        files=lambda result: [f"{REPORTS}/{name}" for name in result[1]],
        facts={
            "gate": [gates.name, gates.relative_l2],
            "batch": profile.batch_max,
            "path": weights.origin.path,
            "host": platform.node(),
        },
        worth_keeping=lambda result: result[0].status != FAILED,
    )
    return verdict


def exit_code(result: BuildResult) -> int:
    """0, or that of a gate: one failed, its own or a part's, or more was lost than is fit to ship and accepted."""
    return 0 if result.bundle.acceptable else GateError.exit_code
