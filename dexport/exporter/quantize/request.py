"""What a build is asked to quantise, checked before any work, and the plan that calibration makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dexport.errors import UsageError
from dexport.exporter.checkpoint import WeightSource
from dexport.exporter.engine import EngineChoice
from dexport.exporter.quantize.calibrate import DEFAULT_IMAGES, Calibration, calibrate
from dexport.exporter.quantize.layers import NetworkLayer, network_layers
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.precision_map import PrecisionMap, read_map, resolve_map
from dexport.exporter.quantize.report import calibration_report, rounding_report
from dexport.exporter.quantize.rounding import round_weights
from dexport.exporter.quantize.schemes import FLOAT, INT4, INT8, LOW_BITS, TERNARY, UNIFORM, W8A8
from dexport.exporter.quantize.ternary import AUTO, TernaryStorage, choose_carrier, ternary_layers
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.steps import StepLog
from dexport.exporter.variant import Variant
from dexport.plugins.functions import MINIMUM_OPSET as FUNCTIONS_OPSET

SMALLEST_TERNARY = "packed"
"""INT4 loses much less in the four bits that the fastest carrier takes."""
FASTEST_INT4 = "nbits4"


@dataclass(frozen=True)
class Asked:
    """The options that decide about quantisation; names follow the command line.

    Attributes:
        ternary: ``--ternary``: rounds the weights of a network that is not ternary by construction.
        precision_map: a file, or patterns -> schemes.
    """

    int8: str | None = None
    ternary: bool | None = None
    precision_map: str | Path | PrecisionMap | None = None
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
        return self.int8 == "w8a8" or bool(self.ternary) or self.precision_map is not None


@dataclass(frozen=True)
class Request:
    """What will be done to the layers of a network.

    Attributes:
        schemes: of every layer.
        carriers: how INT4 and ternary weights are stored.
    """

    layers: Mapping[str, NetworkLayer]
    schemes: Mapping[str, str]
    carriers: Mapping[str, str]
    settings: Calibration

    def has(self, *schemes: str) -> bool:
        return not set(schemes).isdisjoint(self.schemes.values())


def check_asked(recipe: Recipe, asked: Asked) -> None:
    """Refuse options that contradict each other or the recipe.

    Raises:
        UsageError: see there.
    """
    if asked.int8 not in (None, *UNIFORM):
        raise UsageError(f"no INT8 scheme {asked.int8!r}", hint=f"choose from {', '.join(UNIFORM)}")
    given = [name for name, value in (("--int8", asked.int8), ("--precision-map", asked.precision_map)) if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")
    if not asked.calibrates and (asked.calibration_images, asked.calibration_seed) != (DEFAULT_IMAGES, 0):
        raise UsageError(
            "--calibration-images and --calibration-seed need a calibration",
            hint="add --int8 w8a8, --ternary or --precision-map",
        )
    if asked.calibrates:
        _ = asked.calibration
    if asked.int8 == "w8a8" and recipe.sampling is None:
        raise UsageError(f"{recipe.name} is no denoiser: there is no trajectory to calibrate on", hint="--int8 weight")


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
            hint="leave out --int8, or store them dense with --no-ternary",
        )
    rounds = bool(asked.ternary) and storage is None
    if rounds and (asked.int8 or asked.precision_map):
        raise UsageError("--ternary excludes --int8 and --precision-map", hint="say it in the precision map")
    if not (rounds or asked.int8 or asked.precision_map is not None):
        if asked.ternary_carrier != AUTO and storage is None:
            raise UsageError(f"{recipe.name} has no ternary layers to carry", hint="add --ternary, or leave it out")
        return None
    layers = network_layers(variant, ternary=storage is None)
    exclude = (*recipe.quantize_exclude, *islands)
    if asked.precision_map is not None:
        given = asked.precision_map
        found = given if isinstance(given, Mapping) else read_map(given)
        own = {name.removesuffix(".weight") for name in ternary_layers(variant)} if storage is not None else ()
        schemes = resolve_map(found, layers, exclude, own)
        if all(scheme == FLOAT for scheme in schemes.values()):
            return None
    else:
        schemes = resolve_map({"*": TERNARY if rounds else UNIFORM[asked.int8 or ""]}, layers, exclude)
        if all(scheme == FLOAT for scheme in schemes.values()):
            raise UsageError(
                f"nothing to quantise: every layer is excluded by {', '.join(exclude)}",
                hint="leave out --int8 or --ternary, or name layers in a --precision-map",
            )
    if rounds:
        schemes |= _sensitive(schemes, layers, islands)
    carriers = {
        TERNARY: choose_carrier(asked.ternary_carrier, engine, plugins, SMALLEST_TERNARY)[0].name,
        INT4: FASTEST_INT4 if engine is None else "int4",
    }
    request = Request(layers, schemes, carriers, asked.calibration)
    _check_possible(recipe, request, opset)
    return request


def _sensitive(
    schemes: Mapping[str, str], layers: Mapping[str, NetworkLayer], islands: tuple[str, ...]
) -> dict[str, str]:
    """INT8 for what a recipe does not let become ternary, but for its islands: it loses nothing in comparison."""
    recipe_leaves = resolve_map({"*": INT8}, layers, islands)
    return {path: scheme for path, scheme in recipe_leaves.items() if schemes[path] == FLOAT}


def _check_possible(recipe: Recipe, request: Request, opset: int) -> None:
    if request.has(W8A8, *LOW_BITS) and recipe.sampling is None:
        raise UsageError(
            f"{recipe.name} is no denoiser: there is no trajectory to calibrate on, which W8A8, INT4 and ternary need",
            hint="--int8 weight",
        )
    if request.has(*LOW_BITS) and opset < FUNCTIONS_OPSET:
        raise UsageError(f"INT4 and ternary weights need opset {FUNCTIONS_OPSET}", hint=f"--opset {FUNCTIONS_OPSET}")


class Workplace:
    """What calibration keeps beside a bundle, where it outlives a build that was killed."""

    def __init__(self, output: Path) -> None:
        self.statistics = output.with_name(f"{output.name}.calibration.npz")
        self.rounded = output.with_name(f"{output.name}.rounded")

    def remove(self) -> None:
        """When the bundle is there."""
        self.statistics.unlink(missing_ok=True)
        shutil.rmtree(self.rounded, ignore_errors=True)


def make_plan(request: Request, variant: Variant, weights: WeightSource, place: Workplace, log: StepLog) -> Plan:
    """Calibrate as far as the schemes need it."""
    chosen = {scheme: [path for path, s in request.schemes.items() if s == scheme] for scheme in (W8A8, *LOW_BITS)}
    statistics, rounded = {}, None
    if chosen[W8A8]:
        with log.step("calibrate"):
            statistics = calibrate(
                variant, weights, request.settings, chosen[W8A8], place.statistics, log.listener.advance
            )
    if request.has(*LOW_BITS):
        wanted = {path: [scheme] for path, scheme in request.schemes.items() if scheme in LOW_BITS}
        with log.step("round"):
            rounded = round_weights(
                variant, weights, request.settings, wanted, request.layers, place.rounded, log.listener.advance
            )
    return Plan(request.schemes, statistics, request.settings.method, rounded, request.carriers)


def plan_reports(plan: Plan, settings: Calibration, done: Mapping[str, str]) -> dict[str, str]:
    """Report files by name: what the calibration decided, and what rounding did to every layer."""
    reports: dict[str, Any] = {}
    if plan.statistics:
        reports["calibration.json"] = calibration_report(settings, plan.statistics, done)
    if plan.rounded is not None:
        reports["rounding.json"] = rounding_report(settings, plan.rounded, plan.schemes)
    return {name: json.dumps(report, indent=1) + "\n" for name, report in reports.items()}


def describe_request(request: Request) -> dict[str, Any]:
    """JSON values for the manifest's precision section."""
    calibrated = request.has(W8A8, *LOW_BITS)
    used = {scheme: carrier for scheme, carrier in request.carriers.items() if request.has(scheme)}
    return {
        "layers": dict(request.schemes),
        "carriers": used,
        "calibration": asdict(request.settings) if calibrated else None,
    }
