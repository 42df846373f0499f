"""A build with its verdict: the exporter's build, verified by forward parity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dexport.bundle import load_bundle
from dexport.exporter.build import BuildOptions, BuildResult, Case, build
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.rebuild import options_of
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.steps import Listener
from dexport.exporter.stitch import build_stitched, parse_stitch
from dexport.validate.levels.forward import ParityReport, check_parity
from dexport.validate.report.parity_table import markdown


@fresh_torch()
def build_and_validate(
    recipe: str | Recipe | None,
    output: str | Path,
    *,
    stitch: str | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> BuildResult:
    """Build a bundle and gate it; ``options`` are fields of :class:`BuildOptions`.

    ``stitch`` takes the recipe's place: ``NAME[=CHECKPOINT]:SHARE,...``.
    """
    chosen = BuildOptions(output=Path(output), **options)
    if stitch is not None:
        return build_stitched(parse_stitch(stitch), chosen, forward_parity, listener)
    assert recipe is not None
    return build(recipe, chosen, forward_parity, listener)


@fresh_torch()
def quantise_and_validate(
    bundle: str | Path,
    output: str | Path,
    *,
    require_signature: str | Path | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> BuildResult:
    """Build an existing bundle again with quantised weights and gate it; ``options`` are those of
    :func:`~dexport.exporter.rebuild.options_of`."""
    loaded = load_bundle(bundle, require_signature)  # held until the end: a private copy goes with it
    recipe, chosen = options_of(loaded, Path(output), **options)
    return build(recipe, chosen, forward_parity, listener)


def forward_parity(case: Case) -> tuple[ParityReport, Mapping[str, str]]:
    """The verifier of ``dexport build``."""
    if case.remembered is not None:
        return ParityReport.from_json(json.loads(case.remembered["parity.json"])), case.remembered
    report = check_parity(
        case.variant,
        case.weights,
        case.model_path,
        precision=case.precision,
        gate=case.gates.name,
        limit=case.gates.relative_l2,
        max_batch=case.max_batch,
        on_progress=case.on_progress,
    )
    page = markdown(report, case.variant.recipe.name, str(case.weights.origin))
    return report, {"parity.json": json.dumps(report.to_json(), indent=2) + "\n", "parity.md": page}
