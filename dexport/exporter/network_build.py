"""One network of a bundle: weights -> ONNX files -> engines -> verdicts -> its entry in the manifest."""

from __future__ import annotations

import json
import platform
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dexport.bundle import ENGINES, MAIN_GRAPH, MODEL_DATA, REPORTS, Draft, graph_file
from dexport.errors import UsageError
from dexport.exporter.cache import open_cache
from dexport.exporter.custom_ops import REGISTRATION, wants_plugins
from dexport.exporter.describe import count_parameters
from dexport.exporter.engine.choice import EngineChoice, choose_engine
from dexport.exporter.engine.process import EngineReport, EngineRequest, build_engine
from dexport.exporter.export import Exported, convert, export_onnx
from dexport.exporter.gates import NetworkGates, gates_for
from dexport.exporter.manifest import Engine, Verdict, network_entry
from dexport.exporter.options import AUTO_PRECISION, BYTES_PER_WEIGHT, BuildOptions
from dexport.exporter.passes.precision import DATA_MOVEMENT
from dexport.exporter.ports import check_network
from dexport.exporter.quantize.request import Request, Workplace, prepare, request_of
from dexport.exporter.quantize.schemes import gate_of, quantised_layers
from dexport.exporter.quantize.ternary import TernaryStorage, choose_storage
from dexport.exporter.ranges import Ranges, find_ranges
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.resolve import asked_of
from dexport.exporter.reuse import Reuse, engine_report_from_json, exported_from_json, facts_of, is_built_in
from dexport.exporter.steps import StepLog
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant
from dexport.exporter.weights.inherit import inherit_weights
from dexport.exporter.weights.loading import open_weights
from dexport.exporter.weights.source import WeightSource
from dexport.files import outside_drafts
from dexport.plugins.functions import MINIMUM_OPSET as FUNCTIONS_OPSET
from dexport.profiles import Profile, load_profile
from dexport.verdict import FAILED


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
class Settled:
    """A network whose options have been checked: nothing of what follows depends on the user any more."""

    variant: Variant
    options: BuildOptions
    profile: Profile
    choice: EngineChoice | None
    plugins: bool
    ternary: TernaryStorage | None
    islands: Islands
    request: Request | None
    place: Workplace

    @property
    def bytes_needed(self) -> int:
        """The weights once for the ONNX files and once for the plan of each graph."""
        packed = 0 if self.ternary is None else self.ternary.values
        stored = (count_parameters(self.variant) - packed) * BYTES_PER_WEIGHT[self.options.precision]
        if self.ternary is not None:
            stored += packed * self.ternary.carrier.bits // 8
        return stored * (1 + len(self.variant.graphs) * self.options.trt)

    def with_precision(self, precision: str, islands: tuple[str, ...]) -> Settled:
        """The same in a precision that was not known before, with more islands."""
        options = replace(self.options, precision=precision, islands=(*self.options.islands, *islands))
        return settle(self.variant, options, self.place)


def settle(variant: Variant, options: BuildOptions, place: Workplace) -> Settled:
    """Everything about the build of a network that can be refused before work starts.

    Args:
        place: what calibration keeps beside the bundle.

    Raises:
        UsageError, InputError, MachineError: see the options.
    """
    profile = load_profile(options.profile)
    choice = choose_engine(options.engine, options.targets, profile.targets) if options.trt else None
    plugins = wants_plugins(options.plugins, choice)
    ternary = choose_storage(variant, options.ternary, options.ternary_carrier, choice, plugins)
    if ternary is not None and options.opset < FUNCTIONS_OPSET:
        raise UsageError(
            f"packed ternary weights need opset {FUNCTIONS_OPSET}",
            hint=f"--opset {FUNCTIONS_OPSET}, or --quantize none",
        )
    islands = _islands(variant, options)
    request = request_of(variant, asked_of(options), ternary, islands.modules, choice, plugins, options.opset)
    if not is_built_in(variant):  # those agree with their recipes; the trace is held to it all the same
        check_network(variant)
    return Settled(variant, options, profile, choice, plugins, ternary, islands, request, place)


def open_source(variant: Variant, options: BuildOptions) -> WeightSource:
    """Open the weights of a network.

    Raises:
        InputError, UsageError, MachineError: as :func:`~dexport.exporter.weights.loading.open_weights`.
    """
    if options.init_from is None:
        return open_weights(options.checkpoint, variant.outline, seed=options.seed, adapt=variant.recipe.adapt)
    return inherit_weights(options.init_from, variant.outline, variant.recipe.not_inherited, options.seed)


class NetworkFolder:
    """The folder of a network in a draft."""

    def __init__(self, draft: Draft, folder: str) -> None:
        self.draft, self.folder = draft, folder
        self.path = draft.path / folder
        self.path.mkdir(parents=True, exist_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """A file of it."""
        self.draft.write_text(f"{self.folder}/{name}".lstrip("/"), text)


def build_network(
    settled: Settled, weights: WeightSource, folder: NetworkFolder, verify: Verifier, log: StepLog
) -> tuple[dict[str, Any], dict[str, Verdict]]:
    """Build a network into its folder.

    Returns:
        Its entry in the manifest, and the verdicts by graph; empty where nothing was verified.
    """
    variant, first, ranges = settled.variant, len(log.finished), None
    asked = asked_of(settled.options)
    if settled.options.precision == AUTO_PRECISION:
        settled, ranges = _decide_precision(settled, weights, log)
        folder.write_text(f"{REPORTS}/ranges.json", json.dumps(ranges.to_json(), indent=1) + "\n")
    options, request, ternary = settled.options, settled.request, settled.ternary
    quantisation = None
    if request is not None:
        quantised = quantised_layers(request.schemes)

        def graph() -> ir.Model:
            traced = trace(variant, weights, opset=options.opset)
            return convert(
                traced,
                variant,
                precision=options.precision,
                islands=settled.islands,
                ternary=ternary,
                without=options.no_passes,
                quantised=quantised,
            )[0]

        size = BYTES_PER_WEIGHT[options.precision]
        quantisation = prepare(request, variant, weights, settled.place, graph, size, log)
    plugin_target = settled.choice.targets[0] if settled.choice and settled.plugins else None
    reuse = Reuse(
        open_cache() if options.cache and not asked.calibrates and is_built_in(variant) else None,
        f"{variant.recipe.name} {options.precision}",
        folder.path,
        facts_of(variant, weights.origin, options, plugins=plugin_target, ternary=ternary and ternary.describe()),
        log,
        weights.check_unchanged,
    )

    def export() -> dict[str, Exported]:
        return export_onnx(
            variant,
            weights,
            folder.path,
            precision=options.precision,
            islands=settled.islands,
            opset=options.opset,
            plugin_target=plugin_target,
            ternary=ternary,
            plan=None if quantisation is None else quantisation.plan,
            without=options.no_passes,
            log=log,
        )

    exported = reuse.step(
        "onnx",
        export,
        pack=lambda found: {name: asdict(each) for name, each in found.items()},
        unpack=lambda found: {name: exported_from_json(each) for name, each in found.items()},
        files=lambda _: (*map(graph_file, variant.graphs), MODEL_DATA),
    )
    gate, budget = options.precision, None  # name of the gate, and dB
    if quantisation is not None:
        gate = gate_of(quantisation.plan.schemes.values(), options.precision)
        budget = quantisation.budget["asked_snr_db"] if quantisation.budget is not None else None
        done = {path: how for each in exported.values() for path, how in each.quantised.items()}
        for name, text in quantisation.reports(done).items():
            folder.write_text(f"{REPORTS}/{name}", text)
    engines, verdicts = {}, {}
    gates = gates_for(gate, variant.recipe.gates, budget)
    for each in variant.each:
        if settled.choice is not None:
            engines[each.graph] = _build_engine(folder, each, exported[each.graph], settled, settled.choice, reuse)
        if options.parity:
            verdicts[each.graph] = _verify(folder, each, weights, settled, gates, verify, reuse)
    weights.check_unchanged()
    entry = network_entry(
        variant,
        weights={**asdict(weights.origin), "random": weights.origin.random},
        precision=options.precision,
        islands=settled.islands,
        opset=options.opset,
        no_passes=options.no_passes,
        profile=settled.profile,
        exported=exported,
        data_bytes=(folder.path / MODEL_DATA).stat().st_size,
        ternary=None if ternary is None else ternary.describe(),
        engines=engines,
        verdicts=verdicts,
        steps=log.finished[first:],
        quantisation={"gate": gate, **(quantisation.describe() if quantisation else {})},
        ranges=None if ranges is None else ranges.summary(options.islands),
    )
    return entry, verdicts


def _islands(variant: Variant, options: BuildOptions) -> Islands:
    """What stays in float32: the recipe's modules and the user's."""
    islands = variant.recipe.islands
    return replace(islands, modules=(*islands.modules, *options.islands))


def _decide_precision(settled: Settled, weights: WeightSource, log: StepLog) -> tuple[Settled, Ranges]:
    """float16, with an island around everything that it cannot hold."""
    with log.step("ranges"):
        ranges = find_ranges(settled.variant, weights, log.listener.advance)
    return settled.with_precision("fp16", ranges.islands(settled.islands)), ranges


def _build_engine(
    folder: NetworkFolder,
    variant: Variant,
    exported: Exported,
    settled: Settled,
    choice: EngineChoice,
    reuse: Reuse,
) -> Engine:
    profile = settled.profile
    file = f"{ENGINES}/{variant.graph}-{choice.flavour}-{'-'.join(choice.targets)}.plan"
    kept_log = f"{REPORTS}/{report_name('engine', variant.graph)}.log"
    batches = (profile.batch_min, profile.batch_opt, profile.batch_max)
    low, best, high = ({spec.name: spec.dims(b) for spec in variant.signature.inputs} for b in batches)
    request = EngineRequest(
        onnx_path=folder.path / graph_file(variant.graph),
        plan_path=folder.path / file,
        choice=choice,
        shapes={name: (low[name], best[name], high[name]) for name in low},
        expected_dtypes=_decisive(exported),
        workspace_mib=profile.workspace_mib,
        log_path=folder.path / kept_log,
        failed_log=_beside(folder.draft.output),
        plugin_modules=(REGISTRATION,) if settled.plugins else (),
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
        facts={**decides, "graph": variant.graph, "dtypes": request.expected_dtypes},
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
    folder: NetworkFolder,
    variant: Variant,
    weights: WeightSource,
    settled: Settled,
    gates: NetworkGates,
    verify: Verifier,
    reuse: Reuse,
) -> Verdict:
    log, profile = reuse.log, settled.profile
    case = Case(
        variant,
        weights,
        folder.path / graph_file(variant.graph),
        settled.options.precision,
        profile.batch_max,
        gates,
        log.listener.advance,
    )

    def run() -> tuple[Verdict, Mapping[str, str]]:
        with log.step("parity"):
            verdict, reports = verify(case)
            for name, text in reports.items():
                folder.write_text(f"{REPORTS}/{name}", text)
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
            "graph": variant.graph,
            "path": weights.origin.path,
            "host": platform.node(),
        },
        worth_keeping=lambda result: result[0].status != FAILED,
    )
    return verdict


def report_name(what: str, graph: str) -> str:
    """The name of a report on a graph; that of the main one is what it is about."""
    return what if graph == MAIN_GRAPH else f"{what}-{graph}"
