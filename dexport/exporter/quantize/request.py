"""What a build is asked to quantise, checked before any work, and the plan that calibration makes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dexport.errors import UsageError
from dexport.exporter.engine.choice import EngineChoice
from dexport.exporter.pytorch.module_path import inside
from dexport.exporter.quantize.assign import Option
from dexport.exporter.quantize.budget import Budget, Search, parse_budget
from dexport.exporter.quantize.calibrate import DEFAULT_IMAGES, Calibration, calibrate, calibration_key
from dexport.exporter.quantize.layers import NetworkLayer, network_layers
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.precision_map import PrecisionMap, read_map, resolve_map
from dexport.exporter.quantize.report import calibration_report, rounding_report
from dexport.exporter.quantize.rounded import RoundedWeights
from dexport.exporter.quantize.rounding import round_weights
from dexport.exporter.quantize.schemes import FLOAT, INT4, INT8, LOW_BITS, TERNARY, UNIFORM, W8A8, quantised_layers
from dexport.exporter.quantize.sensitivity import Sensitivity, as_json, measure_sensitivity
from dexport.exporter.quantize.simulate import STEPS, Simulation
from dexport.exporter.quantize.sizes import FileSizes
from dexport.exporter.quantize.ternary import AUTO, TernaryStorage, choose_carrier, ternary_layers
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.steps import StepLog
from dexport.exporter.variant import Variant
from dexport.exporter.weights.source import WeightSource
from dexport.plugins.functions import MINIMUM_OPSET as FUNCTIONS_OPSET

SMALLEST_TERNARY = "packed"
"""INT4 loses much less in the four bits that the fastest carrier takes."""
FASTEST_INT4 = "nbits4"


@dataclass(frozen=True)
class Asked:
    """The options that decide about quantisation; names follow the command line.

    Attributes:
        ternary: ``--quantize ternary``: rounds the weights of a network that is not ternary by construction.
        precision_map: a file, or patterns -> schemes.
        budget: see :func:`~dexport.exporter.quantize.budget.parse_budget`.
    """

    int8: str | None = None
    ternary: bool | None = None
    precision_map: str | Path | PrecisionMap | None = None
    budget: str | None = None
    ternary_carrier: str = AUTO
    calibration_images: int = DEFAULT_IMAGES
    calibration_seed: int = 0

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.calibration_images, self.calibration_seed)

    @property
    def quantises(self) -> bool:
        return self.calibrates or self.int8 is not None

    @property
    def calibrates(self) -> bool:
        """Whether settings of a calibration make sense."""
        return self.int8 == "w8a8" or bool(self.ternary or self.budget) or self.precision_map is not None


@dataclass(frozen=True)
class Request:
    """What will be done to the layers of a network.

    Attributes:
        schemes: of every layer; with a budget, ``float`` for what has to stay so.
        carriers: how INT4 and ternary weights are stored.
    """

    layers: Mapping[str, NetworkLayer]
    schemes: Mapping[str, str]
    carriers: Mapping[str, str]
    settings: Calibration
    budget: Budget | None = None

    def has(self, *schemes: str) -> bool:
        return not set(schemes).isdisjoint(self.schemes.values())


def check_asked(recipe: Recipe, asked: Asked, runs: bool) -> None:
    """Refuse options that contradict each other or the recipe.

    Args:
        runs: whether there is a program that runs the network.

    Raises:
        UsageError: see there.
    """
    if asked.int8 not in (None, *UNIFORM):
        raise UsageError(f"no INT8 scheme {asked.int8!r}", hint=f"choose from {', '.join(UNIFORM)}")
    options = {"int8": asked.int8, "map": asked.precision_map, "budget": asked.budget}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"--quantize {' and '.join(given)} exclude each other", hint="give one of them")
    if not asked.calibrates and (asked.calibration_images, asked.calibration_seed) != (DEFAULT_IMAGES, 0):
        raise UsageError(
            "--calibration-images and --calibration-seed need a calibration",
            hint="add --quantize w8a8, ternary, map=FILE or budget=...",
        )
    if asked.calibrates:
        _ = asked.calibration
    if asked.budget is not None:
        parse_budget(asked.budget)
    if asked.int8 == "w8a8" and not runs:
        raise UsageError(
            f"{recipe.name} has no program: there is no trajectory to calibrate on", hint="--quantize int8"
        )


def request_of(
    variant: Variant,
    asked: Asked,
    storage: TernaryStorage | None,
    islands: tuple[str, ...],
    engine: EngineChoice | None,
    plugins: bool,
    opset: int,
) -> Request | None:
    """The scheme of every layer; None where everything stays in floating point.

    Args:
        storage: how the layers are stored that are ternary by construction; they are none of a request's.
        islands: modules that stay in float32 unless a map names them.

    Raises:
        UsageError: unknown layers, nothing to quantise, or something that cannot be calibrated or stored.
    """
    recipe = variant.recipe
    if storage is not None and asked.int8 is not None:
        raise UsageError(
            f"{recipe.name}'s weights are ternary, which takes fewer bits than INT8",
            hint="store them dense first: --quantize none,int8 or none,w8a8",
        )
    rounds = bool(asked.ternary) and storage is None
    chosen = asked.int8 is not None or asked.precision_map is not None or asked.budget is not None
    if rounds and chosen:
        raise UsageError(
            "--quantize ternary excludes int8, w8a8, map and budget", hint="say it in a precision map, layer by layer"
        )
    if not rounds and not chosen:
        if asked.ternary_carrier != AUTO and storage is None:
            raise UsageError(
                f"{recipe.name} has no ternary layers to carry", hint="add --quantize ternary, or leave it out"
            )
        return None
    layers = network_layers(variant, ternary=storage is None)
    _check_exclusions(variant)
    exclude = (*recipe.quantize_exclude, *islands)
    if asked.precision_map is not None:
        given = asked.precision_map
        found = given if isinstance(given, Mapping) else read_map(given)
        own = {name.removesuffix(".weight") for name in ternary_layers(variant)} if storage is not None else ()
        schemes = resolve_map(found, layers, exclude, own)
        if all(scheme == FLOAT for scheme in schemes.values()):
            return None
    elif asked.budget is not None:
        # What the recipe leaves alone is measured as well, but for its islands.
        schemes = resolve_map({"*": TERNARY}, layers, islands)
    else:
        schemes = resolve_map({"*": TERNARY if rounds else UNIFORM[asked.int8 or ""]}, layers, exclude)
    if all(scheme == FLOAT for scheme in schemes.values()):
        raise UsageError(
            f"nothing to quantise: every layer is excluded by {', '.join(exclude)}",
            hint="leave out --quantize, or name layers: --quantize map=FILE",
        )
    if rounds:
        schemes |= _sensitive(schemes, layers, islands)
    carriers = {
        TERNARY: choose_carrier(asked.ternary_carrier, engine, plugins, SMALLEST_TERNARY)[0].name,
        INT4: FASTEST_INT4 if engine is None else "int4",
    }
    budget = None if asked.budget is None else parse_budget(asked.budget)
    request = Request(layers, schemes, carriers, asked.calibration, budget)
    _check_possible(variant, request, opset)
    return request


def _check_exclusions(variant: Variant) -> None:
    paths = [path for path, _ in variant.outline.named_modules()]
    for pattern in variant.recipe.quantize_exclude:
        if not any(inside(path, pattern) for path in paths):
            raise UsageError(
                f"{variant.recipe.name}: the exclusion {pattern!r} matches no module",
                hint=f"correct quantize_exclude of the recipe; modules are called like {', '.join(paths[1:5])}",
            )


def _sensitive(
    schemes: Mapping[str, str], layers: Mapping[str, NetworkLayer], islands: tuple[str, ...]
) -> dict[str, str]:
    """INT8 for what a recipe does not let become ternary, but for its islands: it loses nothing in comparison."""
    recipe_leaves = resolve_map({"*": INT8}, layers, islands)
    return {path: scheme for path, scheme in recipe_leaves.items() if schemes[path] == FLOAT}


def _check_possible(variant: Variant, request: Request, opset: int) -> None:
    if request.has(W8A8, *LOW_BITS) and not variant.runs:
        raise UsageError(
            f"{variant.recipe.name} has no program: there is no trajectory to calibrate on, which W8A8, INT4 and "
            "ternary need",
            hint="--quantize int8",
        )
    if request.has(*LOW_BITS) and opset < FUNCTIONS_OPSET:
        raise UsageError(f"INT4 and ternary weights need opset {FUNCTIONS_OPSET}", hint=f"--opset {FUNCTIONS_OPSET}")


class Workplace:
    """What calibration keeps beside a bundle, where it outlives a build that was killed."""

    def __init__(self, output: Path) -> None:
        self.statistics = output.with_name(f"{output.name}.calibration.npz")
        self.rounded = output.with_name(f"{output.name}.rounded")
        self.sensitivity = output.with_name(f"{output.name}.sensitivity.json")

    def remove(self) -> None:
        """When the bundle is there."""
        self.statistics.unlink(missing_ok=True)
        self.sensitivity.unlink(missing_ok=True)
        RoundedWeights(self.rounded).remove()


@dataclass(frozen=True)
class Quantisation:
    """A plan and how it came about.

    Attributes:
        settings: of the calibration.
        budget: what was asked for and what the plan measures; None without a budget.
        sensitivity: of every layer, where a budget needed it.
    """

    plan: Plan
    settings: Calibration
    budget: Mapping[str, Any] | None = None
    sensitivity: Sensitivity = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """JSON values for the manifest's precision section."""
        used = set(self.plan.schemes.values())
        return {
            "layers": dict(self.plan.schemes),
            "carriers": {scheme: carrier for scheme, carrier in self.plan.carriers.items() if scheme in used},
            "calibration": None if used.isdisjoint((W8A8, *LOW_BITS)) else asdict(self.settings),
            "budget": self.budget,
        }

    def reports(self, done: Mapping[str, str]) -> dict[str, str]:
        """Report files by name: what the calibration decided, and what rounding did to every layer.

        Args:
            done: what :meth:`Plan.apply` returned.
        """
        reports: dict[str, Any] = {}
        if self.plan.statistics:
            reports["calibration.json"] = calibration_report(self.settings, self.plan.statistics, done)
        if not set(LOW_BITS).isdisjoint(self.plan.schemes.values()):
            assert self.plan.rounded is not None
            reports["rounding.json"] = rounding_report(self.settings, self.plan.rounded, self.plan.schemes)
        if self.budget is not None:
            reports["sensitivity.json"] = {"budget": self.budget, "squared relative error": as_json(self.sensitivity)}
        return {name: json.dumps(report, indent=1) + "\n" for name, report in reports.items()}


def prepare(
    request: Request,
    variant: Variant,
    weights: WeightSource,
    place: Workplace,
    graph: Callable[[], ir.Model],
    bytes_per_weight: int,
    log: StepLog,
) -> Quantisation:
    """Calibrate as far as the schemes need it, and choose them where a budget leaves that open.

    Args:
        graph: makes the graph before quantisation; only a budget needs it here.
        bytes_per_weight: of the build's precision.

    Raises:
        InputError: activations that are not finite.
        GateError: a budget that cannot be met.
    """
    if request.budget is not None:
        return _prepare_budget(request, request.budget, variant, weights, place, graph, bytes_per_weight, log)
    settings, tell = request.settings, log.listener.advance
    statistics, rounded = {}, None
    chosen = [path for path, scheme in request.schemes.items() if scheme == W8A8]
    if chosen:
        with log.step("calibrate"):
            statistics = calibrate(variant, weights, settings, chosen, place.statistics, tell)
    if request.has(*LOW_BITS):
        wanted = {path: [scheme] for path, scheme in request.schemes.items() if scheme in LOW_BITS}
        with log.step("round"):
            rounded = round_weights(variant, weights, settings, wanted, request.layers, place.rounded, tell)
    return Quantisation(Plan(request.schemes, statistics, settings.method, rounded, request.carriers), settings)


def _prepare_budget(
    request: Request,
    budget: Budget,
    variant: Variant,
    weights: WeightSource,
    place: Workplace,
    graph: Callable[[], ir.Model],
    bytes_per_weight: int,
    log: StepLog,
) -> Quantisation:
    settings, tell = request.settings, log.listener.advance
    candidates = {
        path: (INT8,) if request.layers[path].convolution else (INT8, *LOW_BITS)
        for path in quantised_layers(request.schemes)
    }
    with log.step("round"):
        wanted = {path: LOW_BITS for path, schemes in candidates.items() if set(LOW_BITS) <= set(schemes)}
        rounded = round_weights(variant, weights, settings, wanted, request.layers, place.rounded, tell)
    with log.step("sensitivity"):
        simulation = Simulation(variant, weights, rounded)
        key = calibration_key(variant, weights, settings, ())
        errors = measure_sensitivity(simulation, candidates, key, place.sensitivity, tell)
    with log.step("budget"):
        sizes = FileSizes(graph(), rounded, request.carriers)
        options = {
            path: {
                scheme: Option(
                    sizes.estimate(request.layers[path], scheme, bytes_per_weight),
                    0.0 if scheme == FLOAT else errors[path][scheme],
                )
                for scheme in (FLOAT, *candidates[path])
            }
            for path in candidates
        }
        float_bytes = sizes.of({})
        search = Search(options, sizes.of, simulation.snr_db, tell)
        found, trial = search.meet(budget, float_bytes)
    facts = {
        "asked": budget.text,
        "asked_snr_db": budget.snr_db,
        "snr_db": trial.snr_db if math.isfinite(trial.snr_db) else None,
        "steps": STEPS,
        "bytes": trial.size,
        "float_bytes": float_bytes,
        "trials": [{"snr_db": t.snr_db if math.isfinite(t.snr_db) else None, "bytes": t.size} for t in search.trials],
    }
    schemes = {path: found.get(path, FLOAT) for path in request.layers}
    return Quantisation(Plan(schemes, {}, settings.method, rounded, request.carriers), settings, facts, errors)
