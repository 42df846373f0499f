"""One bundle with several denoisers and the rule that routes between them (T-Stitch, arXiv 2402.14167)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dexport.bundle import PARTS, STITCH, Bundle, Draft, copy_bundle, load_bundle
from dexport.errors import UsageError
from dexport.exporter.build import (
    BuildOptions,
    BuildResult,
    Sources,
    Verifier,
    build,
    open_sources,
    resolve_decoder,
    resolve_options,
)
from dexport.exporter.machine import package_versions
from dexport.exporter.manifest import Verdict, judgement, sampling
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.steps import Listener
from dexport.runtime.stitch import check_fractions
from dexport.runtime.time_table import TimeTable
from dexport.verdict import PASSED
from dexport.version import __version__

SHARED = ("schedule", "prediction", "latent_scale", "decoder", "classes", "null_label")
"""What denoisers of one trajectory must agree on, besides the shape of their latents and the times that they take."""
FORM = "give NAME[=CHECKPOINT]:FRACTION,..., noisiest first, such as dit-s-2=small.pt:0.4,dit-xl-2=large.pt:0.6"


@dataclass(frozen=True)
class Share:
    """One denoiser: a recipe with its checkpoint, or the folder of a bundle, and its share of the trajectory."""

    source: str
    checkpoint: str | None
    fraction: float

    @property
    def is_bundle(self) -> bool:
        return Path(self.source).is_dir()


def parse_stitch(text: str) -> list[Share]:
    """``NAME[=CHECKPOINT]:FRACTION,...`` -> shares.

    Raises:
        UsageError: another form, fewer than two denoisers, or fractions that do not sum to 1.
    """
    shares = []
    for item in text.split(","):
        name, _, fraction = item.rpartition(":")
        source, _, checkpoint = name.partition("=")
        try:
            shares.append(Share(source, checkpoint or None, float(fraction)))
        except ValueError as error:
            raise UsageError(f"--stitch: {item!r} has no fraction", hint=FORM) from error
        if not source:
            raise UsageError(f"--stitch: {item!r} names no denoiser", hint=FORM)
    if len(shares) < 2:
        raise UsageError(f"--stitch: {text!r} is one denoiser; it takes two or more", hint=FORM)
    check_fractions([share.fraction for share in shares])
    return shares


@fresh_torch()
def build_stitched(
    shares: Sequence[Share], options: BuildOptions, verify: Verifier, listener: Listener | None = None
) -> BuildResult:
    """Build or copy every denoiser into one bundle.

    ``options`` hold for each denoiser that is built here; the decoder, if any, goes with the last of them.

    Raises:
        UsageError: denoisers that cannot share a trajectory. Those that are recipes are checked before any work.
    """
    if options.checkpoint is not None or options.init_from is not None:
        raise UsageError("--checkpoint and --init-from do not say which denoiser they are for", hint=FORM)
    joined = {share: load_bundle(share.source) for share in shares if share.is_bundle}
    names = [f"{index}-{Path(share.source).stem}" for index, share in enumerate(shares)]
    check_agreement(
        {
            name: promise(joined[share].manifest) if share in joined else promise_of_recipe(share.source, options)
            for name, share in zip(names, shares, strict=True)
        }
    )
    built = [share for share in shares if share not in joined]
    if options.with_decoder and not built:
        raise UsageError("--with-decoder needs a denoiser that is built here", hint="leave it out")
    verdicts: dict[str, Verdict | None] = {}
    with Draft(options.output, force=options.force) as draft:
        parts: dict[str, BuildOptions] = {}
        sources: dict[str, Sources] = {}
        for name, share in zip(names, shares, strict=True):
            if share in joined:
                continue
            part = replace(options, output=draft.path / PARTS / name, checkpoint=share.checkpoint, force=False)
            if share is not built[-1]:
                part = replace(part, with_decoder=False, decoder_checkpoint=None)
            variant = resolve_options(share.source, part)
            parts[name], sources[name] = part, open_sources(variant, resolve_decoder(variant, part), part)
        for name, share in zip(names, shares, strict=True):
            if share in joined:
                copy_bundle(joined[share], draft.path / PARTS / name)
                continue
            result = build(share.source, parts[name], verify, listener, sources[name])
            verdicts |= {name: result.verdict, **{f"{name}/{inner}": v for inner, v in result.parts.items()}}
        bundle = draft.commit(compose(draft.path, dict(zip(names, shares, strict=True)), options.accept_loss))
    return BuildResult(bundle, None, verdicts)


def promise_of_recipe(recipe: str, options: BuildOptions) -> dict[str, Any]:
    """:func:`promise` of a bundle that is not built yet."""
    variant = resolve_options(recipe, options)
    return _promise(sampling(variant), variant.signature.inputs[0].shape)


def promise(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a denoiser's bundle says about the trajectories that it takes part in."""
    inputs = manifest.get("io", {}).get("inputs", [{"shape": ()}])
    return _promise(manifest.get("sampling"), inputs[0]["shape"])


def _promise(facts: Mapping[str, Any] | None, shape: Sequence[int | str]) -> dict[str, Any]:
    shared = {key: (facts or {}).get(key) for key in SHARED}
    table = TimeTable.of(facts)
    times = f"those of {table.steps} {(facts or {}).get('sampler')} steps" if table else "any"
    return {"latent": list(shape[1:]), **shared, "times": times, "denoiser": bool(facts and shape)}


def check_agreement(promises: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError unless all denoisers have the same latents, schedule, prediction type and classes."""
    for name, facts in promises.items():
        if not facts["denoiser"]:
            raise UsageError(f"{name} is not a single denoiser and cannot be stitched", hint=FORM)
    first, *others = promises
    problems = [
        f"{key}: {promises[first][key]!r} in {first}, {promises[other][key]!r} in {other}"
        for other in others
        for key in promises[first]
        if promises[first][key] != promises[other][key]
    ]
    if problems:
        raise UsageError(
            "these denoisers cannot share a trajectory:\n    " + "\n    ".join(problems),
            hint="stitch models that were trained with one latent space, schedule and prediction type",
        )


def compose(folder: Path, shares: Mapping[str, Share], accept_loss: bool = False) -> dict[str, Any]:
    """The manifest of a stitched bundle: how the parts share the trajectory; all else is in theirs."""
    parts = Bundle(folder, {"parts": list(shares)}).parts
    manifests = [part.manifest for part in parts.values()]
    seeds = {manifest["weights"]["seed"] for manifest in manifests if manifest["weights"]["random"]}
    return {
        "name": "+".join(manifest["name"] for manifest in manifests),
        **judgement(None, PASSED, accept_loss, parts),
        "dexport": __version__,
        "sampling": manifests[-1]["sampling"],
        STITCH: [{"part": name, "fraction": share.fraction} for name, share in shares.items()],
        "parts": list(shares),
        "weights": {"random": bool(seeds), "seed": seeds.pop() if len(seeds) == 1 else None},
        "tools": package_versions(),
    }
