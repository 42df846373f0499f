"""What ``dexport fid`` does: distances of one set of images to a reference, with the floor they stand on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dexport.errors import InputError, UsageError, free_name
from dexport.places import check_place
from dexport.validate.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    rbf_distance,
)
from dexport.validate.features.evaluator import Evaluator, open_evaluator
from dexport.validate.features.statistics import (
    OnProgress,
    Summary,
    holds_images,
    holds_statistics,
    read_statistics,
    summarise,
    write_statistics,
)
from dexport.validate.images.image_sets import ImageSet, open_images

MOST_PAIRED = 10_000
"""Images of each set that precision, recall and the RBF distance look at: their cost grows with the square."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class SetFacts:
    """A set in a report; ``count`` is None for a reference file that does not say."""

    path: str
    count: int | None


@dataclass(frozen=True)
class SkippedIn:
    """Entries of a folder that are no images of its set; see :class:`~dexport.image_files.Skipped`."""

    path: str
    why: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Floor:
    """The same distances between two disjoint parts of the reference: what a perfect generator would be given.

    Attributes:
        count, against: images of the two parts. ``count`` is that of the samples where the reference has enough.
    """

    frechet: float
    kernel: float
    rbf: float
    count: int
    against: int


@dataclass(frozen=True)
class FidReport:
    """All distances of samples to a reference.

    Attributes:
        distance, spatial_distance: what ``frechet`` and ``spatial`` are called.
        kernel: mean and standard deviation over subsets of the unbiased MMD² (KID, with Inception features).
        rbf: CMMD's formula over the evaluator's features in place of CLIP's, without its factor of 1000.
        score: Inception Score of the samples, mean and standard deviation over splits.
        precision_recall: with ``NEIGHBOURS`` neighbours.
        not_run: what is missing above, and why.
        skipped: what the folders hold besides images, and was not counted.
    """

    evaluator: str
    weights: str
    weights_sha256: str
    seed: int
    samples: SetFacts
    reference: SetFacts
    distance: str
    frechet: float
    spatial_distance: str
    spatial: float | None
    kernel: tuple[float, float] | None
    rbf: float | None
    score: tuple[float, float] | None
    precision_recall: tuple[float, float] | None
    floor: Floor | None
    warnings: tuple[str, ...]
    not_run: tuple[str, ...]
    skipped: tuple[SkippedIn, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def measure_fid(
    samples: Path,
    reference: Path,
    *,
    evaluator: str = "inception",
    weights: Path | None = None,
    batch: int = 32,
    seed: int = 0,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> FidReport:
    """Distances of ``samples`` to ``reference``: each a folder of images, or an ``.npz`` of images or statistics.

    Args:
        seed: of the subsets and splits, and of the parts of the reference that make the floor.

    Raises:
        UsageError: paths that do not exist, an unknown evaluator.
        InputError: bad images or statistics, sets whose features do not compare.
        MachineError: no weights.
    """
    _check_numbers(batch, seed)
    inputs = [_open(path) for path in (samples, reference)]
    network = open_evaluator(evaluator, weights)
    moments = [read_statistics(path, network) if holds_statistics(path) else None for path, _ in inputs]
    ours, real = (
        _summary(given, images, network, batch, on_progress) for given, (_, images) in zip(moments, inputs, strict=True)
    )
    report = _report(
        ours,
        real,
        network,
        SetFacts(str(samples), ours.moments.count),
        SetFacts(str(reference), real.moments.count),
        seed,
        (*_size_warnings(inputs), *(line for _, images in inputs if images is not None for line in images.warnings)),
    )
    return replace(report, skipped=tuple(skipped for path, images in inputs for skipped in _skipped(path, images)))


def save_statistics(
    images: Path,
    output: Path,
    *,
    evaluator: str = "inception",
    weights: Path | None = None,
    batch: int = 32,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> dict[str, Any]:
    """Write a reference file in ADM's layout, and say what is in it; see :func:`write_statistics`.

    Raises:
        UsageError: a place where no such file can be written, or the file of the images themselves.
        InputError, MachineError: as :func:`measure_fid`.
    """
    _check_numbers(batch, 0)
    if output.suffix != ".npz":
        raise UsageError(
            f"--save-stats {output} is not an .npz file", hint=f"for example {free_name(output.with_suffix('.npz'))}"
        )
    check_place(output)
    if output.exists() and images.exists() and output.samefile(images):
        raise UsageError(f"--save-stats {output} is the file of the images", hint="choose another output")
    opened = open_images(images)
    network = open_evaluator(evaluator, weights)
    summary = summarise(opened, network, batch, on_progress)
    write_statistics(output, summary, opened, network)
    return {
        "path": str(output),
        "count": opened.count,
        "evaluator": network.name,
        "weights": network.weights,
        "weights_sha256": network.sha256,
        "skipped": [asdict(skipped) for skipped in _skipped(images, opened)],
        "warnings": list(opened.warnings),
    }


def _skipped(path: Path, images: ImageSet | None) -> list[SkippedIn]:
    if images is None:
        return []
    return [SkippedIn(str(path), skipped.why, skipped.count, skipped.names) for skipped in images.skipped]


def _check_numbers(batch: int, seed: int) -> None:
    if batch < 1 or seed < 0:
        raise UsageError(f"--batch {batch}, --seed {seed}: they start at 1 and at 0", hint="leave them out")


def _open(path: Path) -> tuple[Path, ImageSet | None]:
    """Everything that can be refused is refused before the first image is evaluated."""
    if holds_statistics(path) and not holds_images(path):
        return path, None
    return path, open_images(path)


def _summary(
    given: Summary | None, images: ImageSet | None, evaluator: Evaluator, batch: int, on_progress: OnProgress
) -> Summary:
    """A reference file counts for its moments, also where it brings a part of its images."""
    if images is None:
        assert given is not None
        return given
    seen = summarise(images, evaluator, batch, on_progress)
    return seen if given is None else Summary(given.moments, given.spatial, seen.features, seen.logits)


def _report(
    ours: Summary,
    real: Summary,
    evaluator: Evaluator,
    samples: SetFacts,
    reference: SetFacts,
    seed: int,
    warnings: tuple[str, ...],
) -> FidReport:
    _check_dimensions(ours.moments, real.moments, reference.path)
    not_run = []
    kernel = rbf = neighbours = None
    if ours.features is None or real.features is None:
        not_run.append("kernel distances, precision, recall: a set has statistics and no images")
    else:
        kernel = kernel_distance(ours.features, real.features, seed=seed)
        rbf = rbf_distance(_some(ours.features, seed), _some(real.features, seed))
        if min(len(ours.features), len(real.features)) > NEIGHBOURS:
            neighbours = precision_recall(_some(ours.features, seed), _some(real.features, seed), NEIGHBOURS)
        else:
            not_run.append(f"precision, recall: they take more than {NEIGHBOURS} images of each set")
    spatial = None
    if ours.spatial is not None and real.spatial is not None:
        _check_dimensions(ours.spatial, real.spatial, reference.path)
        spatial = frechet_distance(ours.spatial, real.spatial)
    elif evaluator.spatial_distance:
        not_run.append(f"{evaluator.spatial_distance}: a set has no spatial statistics (mu_s, sigma_s)")
    if ours.logits is None and evaluator.name == "inception":
        not_run.append("Inception Score: these weights, or these statistics, have no classifier outputs")
    floor = floor_of(real, samples.count, seed)
    if floor is None:
        not_run.append("floor: the reference has statistics, or too few images to split")
    fewest = len(ours.moments.mean)  # below it the covariance is singular: 2048 for Inception
    few = [facts for facts in (samples, reference) if facts.count is not None and facts.count < fewest]
    return FidReport(
        evaluator=evaluator.name,
        weights=evaluator.weights,
        weights_sha256=evaluator.sha256,
        seed=seed,
        samples=samples,
        reference=reference,
        distance=evaluator.distance,
        frechet=frechet_distance(ours.moments, real.moments),
        spatial_distance=evaluator.spatial_distance,
        spatial=spatial,
        kernel=kernel,
        rbf=rbf,
        score=None if ours.logits is None else inception_score(ours.logits, seed=seed),
        precision_recall=neighbours,
        floor=floor,
        warnings=(
            *warnings,
            *(
                f"{facts.path} has {facts.count} images: below {fewest} a Fréchet distance mostly measures how few "
                "there are; compare it with the floor, or read the kernel distance"
                for facts in few
            ),
        ),
        not_run=tuple(not_run),
    )


def floor_of(real: Summary, count: int | None, seed: int) -> Floor | None:
    """As many reference images as there are samples against the others; where they are too few, half against half."""
    if real.features is None or len(real.features) < 4:
        return None
    total = len(real.features)
    first = min(count or total, total // 2)
    shuffled = real.features[np.random.default_rng(seed).permutation(total)]
    a, b = shuffled[:first], shuffled[first:]
    if first < 2:
        return None
    return Floor(
        frechet=frechet_distance(Moments.of(a), Moments.of(b)),
        kernel=kernel_distance(a, b, seed=seed)[0],
        rbf=rbf_distance(_some(a, seed), _some(b, seed)),
        count=first,
        against=total - first,
    )


def _some(features: np.ndarray, seed: int) -> np.ndarray:
    if len(features) <= MOST_PAIRED:
        return features
    return features[np.random.default_rng(seed).choice(len(features), MOST_PAIRED, replace=False)]


def _check_dimensions(ours: Moments, real: Moments, path: str) -> None:
    if len(ours.mean) != len(real.mean):
        raise InputError(
            f"{path} has {len(real.mean)} features per image, the samples have {len(ours.mean)}",
            hint="both sets need the same evaluator; for pixels, also the same number of channels",
        )


def _size_warnings(inputs: list[tuple[Path, ImageSet | None]]) -> list[str]:
    shapes = {images.shape for _, images in inputs if images is not None}
    if len(shapes) < 2:
        return []
    sizes = " and ".join(f"{height}x{width}x{channels}" for height, width, channels in sorted(shapes))
    return [f"the sets have images of {sizes}: the difference is part of the distance"]
