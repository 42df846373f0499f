"""``dexport diff --fix``: build a bundle again as its manifest says, with islands added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dexport.bundle import DECODER, Bundle
from dexport.errors import GateError
from dexport.exporter.build import BuildResult
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.steps import Listener
from dexport.validate.build import build_and_validate
from dexport.validate.comparison import islands_of
from dexport.validate.diff import EXPORT, PRECISION, Diff

INSTEAD = {
    EXPORT: "the export itself is at fault: report it with the recipe and its settings",
    "altered": "the file is not what its recipe and checkpoint give: `dexport build` it again",
    "inexact": "keep the block out of the quantisation, or in float32, with --island",
    "gathered": "`dexport build` with more islands, or in another precision",
}


def fixing_islands(result: Diff) -> tuple[str, ...]:
    """The islands to add.

    Raises:
        GateError: there is nothing that islands would mend.
    """
    if result.finding is None:
        raise GateError(f"{result.bundle}: nothing to fix was found", hint="leave out --fix")
    if result.finding.kind != PRECISION:
        raise GateError(
            f"{result.bundle}: islands do not mend this: {result.finding.block} is {result.finding.kind}",
            hint=INSTEAD[result.finding.kind],
        )
    assert result.mend is not None
    if not result.mend.enough:
        raise GateError(
            f"{result.bundle}: no islands were found that mend every block",
            hint="`dexport build` with --bf16 or --fp32",
        )
    return result.mend.islands


def rebuild(
    bundle: Bundle,
    islands: Sequence[str],
    output: Path,
    *,
    checkpoint: str | None = None,
    recipe: Recipe | None = None,
    listener: Listener | None = None,
) -> BuildResult:
    """Build the bundle again, with more islands, at ``output``; the old one stays.

    Args:
        checkpoint: where the weights are now, if not where they were.
    """
    manifest = bundle.manifest
    recipe = recipe or find_recipe(manifest["recipe"]["name"])
    kept = [module for module in islands_of(manifest).modules if module not in recipe.islands.modules]
    return build_and_validate(
        recipe, output, islands=(*kept, *islands), listener=listener, **_options(bundle, checkpoint)
    )


def _options(bundle: Bundle, checkpoint: str | None) -> dict[str, Any]:
    manifest = bundle.manifest
    origin, engine, ternary = manifest["weights"], manifest["engine"], manifest["ternary"]
    options: dict[str, Any] = {
        **_weights(origin, checkpoint),
        "settings": manifest["config"],
        "latent": tuple(manifest["latent"]),
        "guidance": "none" if manifest["guidance"] == "none" else "fused",
        "precision": manifest["precision"]["name"],
        "opset": manifest["opset"],
        "profile": manifest["profile"],
    }
    if ternary is None:
        options["ternary"] = False
    else:
        options["ternary_carrier"] = ternary["carrier"]
    if engine is not None:
        options |= {"trt": True, "engine": engine["flavour"], "targets": tuple(engine["targets"])}
    decoder = bundle.parts.get(DECODER)
    if decoder is not None:
        options |= {"with_decoder": True, "decoder_checkpoint": decoder.manifest["weights"]["path"] or None}
    return options


def _weights(origin: Mapping[str, Any], checkpoint: str | None) -> dict[str, Any]:
    if origin["kind"] == "random":
        return {"seed": origin["seed"]}
    path = checkpoint or origin["path"]
    return {"init_from": path, "seed": origin["seed"]} if origin["kind"] == "inherited" else {"checkpoint": path}
