"""The bundle's images against PyTorch's from the same noise, as a feature network sees them.

The headline is the *paired delta*: the distance of the bundle's images to real ones minus that of PyTorch's. Both share
their noise and with it the bias of small samples, so the difference is known far better than either distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dexport.errors import InputError, UsageError
from dexport.runtime.opened import OpenProgram
from dexport.validate.distances import PairedDelta, RunningMoments, frechet_to, kernel_to, paired_delta
from dexport.validate.features.evaluator import Evaluator
from dexport.validate.features.feature_cache import cached_features
from dexport.validate.features.statistics import Summary, holds_images, holds_statistics, read_statistics
from dexport.validate.fid import Floor, floor_of
from dexport.validate.images.image_sets import open_images
from dexport.validate.images.picture_pairs import Histogram, Likeness, Pair, compare_pictures
from dexport.validate.images.sampled_sets import fingerprint, sample_set
from dexport.validate.levels.trajectory import captions

BOOTSTRAP = 200
PICTURES = 64
"""That are compared at once."""
MOST_KERNEL_PAIRS = 5000
"""Of which the kernel distance is taken: it holds a matrix of all pairs of images."""
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DistributionReport:
    """Distances of two sets of images to the same real ones.

    Attributes:
        distance, kernel_distance: what the distances of this evaluator are called.
        count: images of each of the two sets.
        delta, kernel_delta: bundle minus PyTorch; their ``a`` is the bundle's distance and ``b`` PyTorch's.
        floor: the distance between two parts of the real images.
        lowest_psnr_db: of the pair that is least alike; None where all are equal.
        equal: pairs that are equal in every pixel.
        limit: largest delta allowed.
    """

    reference: str
    runner: str
    evaluator: str
    weights: str
    weights_sha256: str
    distance: str
    kernel_distance: str
    real: str
    real_sha256: str
    real_count: int | None
    count: int
    run: str
    seed: int
    delta: PairedDelta
    kernel_delta: PairedDelta | None
    floor: Floor | None
    lowest_psnr_db: float | None
    equal: int
    pairs: tuple[Pair, ...]
    histograms: tuple[Histogram, ...]
    warnings: tuple[str, ...]
    not_run: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Real:
    """Real images: what was made of them, where they are, and what is to be known of them; ``shape`` (H, W, C)."""

    path: Path
    sha256: str
    summary: Summary
    shape: tuple[int, int, int] | None = None
    warnings: tuple[str, ...] = ()


def check_distribution(
    program: OpenProgram,
    reference: OpenProgram,
    labels: Sequence[int],
    *,
    evaluator: Evaluator,
    real: Path,
    work: Path,
    identity: Mapping[str, Any],
    seed: int = 0,
    batch: int = 8,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> DistributionReport:
    """Sample both, evaluate both, and compare their distances to real images.

    Args:
        reference: the same program on PyTorch sessions.
        labels: one image each, two or more; an unconditional network takes as many zeros as images.
        real: a folder of images, an ``.npz`` of images, or ADM's statistics.
        work: folder for pictures and features; a run that was killed goes on there.
        identity: what fixes the networks: hashes of the bundle's files, of the weights, of a reference of one's own.

    Raises:
        InputError: real images that cannot be read or compared.
        GateError: latents that are not finite.
    """
    if len(labels) < 2:
        raise UsageError("a distribution needs two images or more", hint="give more with --count or --classes")
    target = summarise_real(real, evaluator, work, on_progress)
    settings = {
        **{name: identity[name] for name in ("weights", "reference")},
        "program": program.program.to_json(),
        "seed": seed,
        "labels": list(labels),
    }
    sides = {
        "pytorch": (reference, {**settings, "runner": reference.runner}),
        "bundle": (program, {**settings, "runner": program.runner, "files": identity["files"]}),
    }
    pictures, features = {}, {}
    for side, (source, fixed) in sides.items():
        folder = sample_set(source, work, side, fixed, labels, seed=seed, batch=batch, on_progress=on_progress)
        images = open_images(folder)
        pictures[side] = images
        chunks = cached_features(images, evaluator, work / "features" / folder.name, batch, on_progress)
        features[side] = _checked(np.concatenate([chunk.pool for chunk in chunks]), side)
    on_progress(0, 1, "bootstrap")
    likeness = compare_pictures(
        zip(*(pictures[side].batches(PICTURES) for side in sides), strict=True), captions(program, labels)
    )
    return _report(program, reference, evaluator, target, settings, pictures["bundle"].shape, likeness, features)


def summarise_real(path: Path, evaluator: Evaluator, work: Path, on_progress: OnProgress) -> Real:
    """Moments of real images, and their features where there are images; a file with moments counts for these."""
    sha256 = fingerprint(path)
    given = read_statistics(path, evaluator) if holds_statistics(path) else None
    if given is not None and not holds_images(path):
        return Real(path, sha256, given)
    images, moments, features = open_images(path), RunningMoments(), []
    for chunk in cached_features(images, evaluator, work / "features" / f"real-{sha256[:12]}", 32, on_progress):
        moments.add(chunk.pool)
        features.append(chunk.pool.astype(np.float32))
    summary = Summary(given.moments if given else moments.moments(), None, np.concatenate(features))
    skipped = (f"{images.path}: skipped {one}" for one in images.skipped)
    return Real(path, sha256, summary, images.shape, (*images.warnings, *skipped))


def _checked(features: np.ndarray, side: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(
            f"the features of {len(bad)} of {len(features)} {side} images are not finite, first of image {bad[0]}",
            hint="look at that image in the work folder and at the weights of the evaluator",
        )
    return features


def _report(
    program: OpenProgram,
    reference: OpenProgram,
    evaluator: Evaluator,
    real: Real,
    settings: Mapping[str, Any],
    shape: tuple[int, int, int],
    likeness: Likeness,
    features: Mapping[str, np.ndarray],
) -> DistributionReport:
    ours, theirs, moments = features["bundle"], features["pytorch"], real.summary.moments
    if ours.shape[1] != len(moments.mean):
        raise InputError(
            f"{real.path} has {len(moments.mean)} features per image, the samples have {ours.shape[1]}",
            hint="real images need as many channels as the samples, and statistics the same evaluator",
        )
    seed, count = settings["seed"], len(ours)
    is_fid = evaluator.distance == "FID"
    not_run, warnings, kernel = [], [], None
    if real.summary.features is None:
        not_run.append("kernel distance: the reference has statistics and no images")
    else:
        some = slice(MOST_KERNEL_PAIRS)
        kernel = paired_delta(
            ours[some], theirs[some], real.summary.features, kernel_to, bootstrap=BOOTSTRAP, seed=seed
        )
    floor = floor_of(real.summary, count, seed)
    if floor is None:
        not_run.append("floor: the reference has statistics, or too few images to split")
    if count < ours.shape[1]:
        warnings.append(
            f"{count} images: below {ours.shape[1]} a Fréchet distance mostly measures how few there are; "
            "the delta is of pairs and does not"
        )
    warnings += real.warnings
    if real.shape not in (None, shape):
        sizes = " and ".join("x".join(map(str, size)) for size in (shape, real.shape or ()))
        warnings.append(f"samples and real images are {sizes}: the difference is part of both distances")
    lowest = min(likeness.psnr_db)
    return DistributionReport(
        reference=reference.runner,
        runner=program.runner,
        evaluator=evaluator.name,
        weights=evaluator.weights,
        weights_sha256=evaluator.sha256,
        distance=evaluator.distance,
        kernel_distance="KID" if is_fid else evaluator.distance.replace("Fréchet", "kernel"),
        real=str(real.path),
        real_sha256=real.sha256,
        real_count=moments.count,
        count=count,
        run=program.program.title,
        seed=seed,
        delta=paired_delta(ours, theirs, moments, frechet_to, bootstrap=BOOTSTRAP, seed=seed),
        kernel_delta=kernel,
        floor=floor,
        lowest_psnr_db=lowest if math.isfinite(lowest) else None,
        equal=sum(math.isinf(score) for score in likeness.psnr_db),
        pairs=likeness.pairs,
        histograms=(likeness.histogram,),
        warnings=tuple(warnings),
        not_run=tuple(not_run),
    )
