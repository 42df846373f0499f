"""A build with its verdict: the exporter's build, verified by forward parity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dexport.bundle import load_bundle
from dexport.errors import UsageError
from dexport.exporter.build import BuildResult, build
from dexport.exporter.network_build import Case, report_name
from dexport.exporter.options import BuildOptions, Player
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.rebuild import options_of
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.recipes.system import System
from dexport.exporter.steps import Listener
from dexport.runtime.programs.diffusion import GUIDED
from dexport.runtime.stitch import check_fractions
from dexport.validate.levels.forward import ParityReport, check_parity
from dexport.validate.report.parity_table import markdown

STITCH_FORM = "give NAME[=CHECKPOINT]:FRACTION,..., noisiest first, such as dit-s-2=small.pt:0.4,dit-xl-2=large.pt:0.6"


@fresh_torch()
def build_and_validate(
    recipe: str | Recipe | System | None,
    output: str | Path,
    *,
    stitch: str | None = None,
    with_decoder: bool = False,
    decoder_checkpoint: str | None = None,
    checkpoints: Mapping[str, str] | None = None,
    guidance: str = "none",
    listener: Listener | None = None,
    **options: Any,
) -> BuildResult:
    """Build a bundle and gate it; ``options`` are fields of :class:`~dexport.exporter.options.BuildOptions`.

    Args:
        recipe: None with ``stitch``.
        stitch: several denoisers with their shares of the trajectory, ``NAME[=CHECKPOINT]:SHARE,...``.
        with_decoder: fill the role ``decoder``, from ``decoder_checkpoint`` or ``checkpoints["decoder"]``.
        checkpoints: by the names of networks.
        guidance: ``fused`` exports the graph ``guided``.
    """
    players: dict[str, tuple[Player, ...]] = dict(options.pop("players", {}))
    files = dict(checkpoints or {})
    if decoder_checkpoint is not None:
        files["decoder"] = decoder_checkpoint
    if stitch is not None:
        players = {"denoiser": parse_stitch(stitch), **players}
    if with_decoder:
        players["decoder"] = (Player(checkpoint=files.pop("decoder", None)),)
    if guidance not in ("none", "fused"):
        raise UsageError(f"no guidance {guidance!r}", hint="choose none or fused")
    if guidance == "fused":
        options["graphs"] = (GUIDED, *options.get("graphs", ()))
    chosen = BuildOptions(output=Path(output), players=players, checkpoints=files, **options)
    return build(recipe, chosen, forward_parity, listener)


def parse_stitch(text: str) -> tuple[Player, ...]:
    """``NAME[=CHECKPOINT]:FRACTION,...`` -> networks of the role ``denoiser``.

    Raises:
        UsageError: another form, fewer than two denoisers, or fractions that do not sum to 1.
    """
    players = []
    for item in text.split(","):
        name, _, fraction = item.rpartition(":")
        source, _, checkpoint = name.partition("=")
        try:
            players.append(Player(source, checkpoint or None, float(fraction)))
        except ValueError as error:
            raise UsageError(f"--stitch: {item!r} has no fraction", hint=STITCH_FORM) from error
        if not source:
            raise UsageError(f"--stitch: {item!r} names no denoiser", hint=STITCH_FORM)
    if len(players) < 2:
        raise UsageError(f"--stitch: {text!r} is one denoiser; it takes two or more", hint=STITCH_FORM)
    check_fractions([player.share or 0.0 for player in players])
    return tuple(players)


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
    name = report_name("parity", case.variant.graph)
    if case.remembered is not None:
        return ParityReport.from_json(json.loads(case.remembered[f"{name}.json"])), case.remembered
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
    return report, {f"{name}.json": json.dumps(report.to_json(), indent=2) + "\n", f"{name}.md": page}
