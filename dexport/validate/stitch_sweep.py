"""What stitching costs and what it changes, over the share of the first of two denoisers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dexport.errors import UsageError
from dexport.files import replacing
from dexport.limits import MOST_BATCH, check_pictures, check_whole
from dexport.optional import optional_import
from dexport.runtime.draws import Draws
from dexport.runtime.pipeline import Pipeline
from dexport.runtime.samplers import Denoiser
from dexport.runtime.samplers import sample as run
from dexport.runtime.stitch import Stitch, halves
from dexport.validate.distances import PIXELS, Moments, frechet_distance, pooled_pixels
from dexport.validate.metrics import compare


@dataclass(frozen=True)
class Point:
    """One share of the first denoiser.

    Attributes:
        evaluations: how often each denoiser ran for one image.
        seconds: network time per image: evaluations times the fastest time of one, as other work only slows one down.
        cost: ``seconds`` relative to share 0.
        relative_l2: of the images against those of share 0, which have the same noise.
        frechet: distance over pooled pixels to the reference images; None without any.
    """

    fraction: float
    evaluations: tuple[int, ...]
    seconds: float
    cost: float
    relative_l2: float
    frechet: float | None


@dataclass(frozen=True)
class Sweep:
    """All points of one sweep, and what they have in common."""

    bundle: str
    runner: str
    sampler: str
    steps: int
    cfg: float
    seed: int
    images: int
    reference_images: int
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def sweep(
    pipeline: Pipeline,
    fractions: Sequence[float],
    *,
    count: int = 1,
    sampler: str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    batch: int = 8,
    reference: np.ndarray | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> Sweep:
    """Sample ``count`` images of every class, or ``count`` without classes, at every share, with the same noise.

    Args:
        fractions: shares of the first denoiser; 0, the comparison, is always measured.
        reference: real images (N, H, W, C) uint8 for the distance; without, only the paired error is reported.

    Raises:
        UsageError: a bundle that does not stitch two denoisers, or shares outside [0, 1].
    """
    if len(pipeline.fractions) != 2:
        raise UsageError(
            f"{pipeline.bundle.path} holds {max(1, len(pipeline.fractions))} denoisers; a sweep takes two",
            hint="build one with --stitch SMALL:0.4,LARGE:0.6",
        )
    shares = [halves(fraction) for fraction in sorted({0.0, *fractions})]
    check_pictures(pipeline.classes or 1, count)
    check_whole("--batch", batch, MOST_BATCH, 1)
    labels: list[int] = np.repeat(np.arange(pipeline.classes or 1), count).tolist()
    plan = pipeline.sampler(sampler, steps)
    real = None if reference is None else Moments.of(pooled_pixels(reference))
    total = len(shares) * len(labels)
    batch = min(batch, pipeline.largest_batch(cfg_scale) or batch)
    watches = Watch(), Watch()

    runs: list[tuple[np.ndarray, list[int]]] = []
    for share in shares:
        before, parts = [len(watch.seconds) for watch in watches], []
        for start in range(0, len(labels), batch):
            on_progress(len(runs) * len(labels) + start, total, f"share {share[0]:g}")
            some = labels[start : start + batch]
            given = [] if pipeline.classes is None else some
            denoisers = [
                watch.around(denoiser)
                for watch, denoiser in zip(watches, pipeline.denoisers(given, cfg_scale), strict=True)
            ]
            noise = Draws(seed, images=range(start, start + len(some)))
            latents = run(plan, Stitch(denoisers, share, plan.remaining), noise, (len(some), *pipeline.shape))
            parts.append(pipeline.images(latents.astype(np.float32)))
        batches = -(-len(labels) // batch)
        runs.append(
            (
                np.concatenate(parts),
                [(len(watch.seconds) - past) // batches for watch, past in zip(watches, before, strict=True)],
            )
        )
    costs = [sum(n * watch.fastest() for n, watch in zip(evaluations, watches, strict=True)) for _, evaluations in runs]
    points = tuple(
        Point(
            fraction=share[0],
            evaluations=(evaluations[0], evaluations[1]),
            seconds=cost,
            cost=cost / costs[0],
            relative_l2=compare(runs[0][0], images).relative_l2,
            frechet=None if real is None else frechet_distance(Moments.of(pooled_pixels(images)), real),
        )
        for share, (images, evaluations), cost in zip(shares, runs, costs, strict=True)
    )
    return Sweep(
        bundle=pipeline.bundle.manifest["name"],
        runner=pipeline.runner,
        sampler=sampler or pipeline.facts["sampler"],
        steps=steps or pipeline.facts["steps"],
        cfg=pipeline.default_scale if cfg_scale is None else cfg_scale,
        seed=seed,
        images=len(labels),
        reference_images=0 if reference is None else len(reference),
        points=points,
    )


@dataclass
class Watch:
    """Times every evaluation of one denoiser, per image."""

    seconds: list[float] = field(default_factory=list)

    def around(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser, timed."""

        def timed(x: np.ndarray, t: np.ndarray) -> np.ndarray:
            started = time.perf_counter()
            out = denoiser(x, t)
            self.seconds.append((time.perf_counter() - started) / len(x))
            return out

        return timed

    def fastest(self) -> float:
        """Seconds of one evaluation of one image; 0 where there was none."""
        return min(self.seconds, default=0.0)


def plot(result: Sweep, path: Path) -> None:
    """Cost and distances over the share of the first denoiser, as a PNG file."""
    optional_import("matplotlib").use("Agg")
    pyplot = optional_import("matplotlib.pyplot")
    shares = [point.fraction for point in result.points]
    with_reference = result.reference_images > 0
    figure, axes = pyplot.subplots(1, 3 if with_reference else 2, figsize=(4 * (3 if with_reference else 2), 3.2))
    curves = [("cost relative to share 0", [point.cost for point in result.points])]
    curves.append(("relative L2 to share 0, same noise", [point.relative_l2 for point in result.points]))
    if with_reference:
        curves.append((PIXELS, [point.frechet or 0.0 for point in result.points]))
    for axis, (title, values) in zip(axes, curves, strict=True):
        axis.plot(shares, values, marker="o")
        axis.set(title=title, xlabel="share of the small denoiser", ylim=(0, None))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{result.bundle}: {result.steps} {result.sampler} steps, cfg {result.cfg:g}", fontsize=10)
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
