"""``dexport diff --fix``: build a bundle again as its manifest says, with islands added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dexport.errors import GateError
from dexport.exporter.build import BuildOptions, BuildResult, build
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.steps import Listener
from dexport.validate.build import forward_parity
from dexport.validate.compare.diff import EXPORT, PRECISION, Diff

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
    recipe: Recipe, recorded: BuildOptions, islands: Sequence[str], listener: Listener | None = None
) -> BuildResult:
    """Build a bundle again with more islands.

    Args:
        recipe, recorded: what it was built with and where the new one goes, of
            :func:`~dexport.exporter.rebuild.recorded_options`.
    """
    return build(recipe, replace(recorded, islands=(*recorded.islands, *islands)), forward_parity, listener)
