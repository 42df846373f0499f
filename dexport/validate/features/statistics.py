"""What one pass over a set of images leaves, and the reference files of ADM that hold it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dexport.errors import InputError
from dexport.files import replacing
from dexport.npz import Npz, open_npz
from dexport.printable import printable
from dexport.validate.distances import Moments, RunningMoments
from dexport.validate.distances.pixels import ARRAY
from dexport.validate.features.evaluator import EVALUATORS, Evaluator
from dexport.validate.images.image_sets import ImageSet, open_images

OnProgress = Callable[[int, int, str], None]
PROVENANCE = ("evaluator", "weights_sha256", "count")
"""Keys that we add to ADM's; its evaluator reads those it knows and no others."""
NUMBERS = "fiu"
MOST_FEATURES = 1 << 13
"""Per image, of which a covariance takes 512 MB; Inception has 2048."""
LARGEST_VALUE = 1e100
"""Whose square is still far from infinite."""
ROUNDING = 1e-5
"""Of a covariance that somebody stored in float32, as a share of its largest value."""
LARGEST_SCALAR = 1 << 12
MOST_IMAGES = 1 << 40


@dataclass(frozen=True)
class Summary:
    """Features of one set.

    Attributes:
        moments, spatial: of the pooled features and of the spatial ones, where the evaluator has such.
        features: (N, D) float32, pooled; None where only moments were given. 8 KB per image for Inception.
        logits: (N, K) float32, where the evaluator has a classifier.
    """

    moments: Moments
    spatial: Moments | None = None
    features: np.ndarray | None = None
    logits: np.ndarray | None = None


def summarise(
    images: ImageSet,
    evaluator: Evaluator,
    batch: int = 32,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Summary:
    """Features and moments of all images, in one pass.

    Raises:
        InputError: unreadable images, features that are not finite, fewer than two images.
    """
    moments, spatial = RunningMoments(), RunningMoments()
    features, logits = [], []
    for pixels in images.batches(batch):
        on_progress(moments.count, images.count, f"{moments.count} of {images.count} of {images.path.name}")
        some = evaluator.extract(pixels)
        moments.add(some.pool)
        features.append(some.pool.astype(np.float32))
        if some.spatial is not None:
            spatial.add(some.spatial)
        if some.logits is not None:
            logits.append(some.logits)
    return Summary(
        moments.moments(),
        spatial.moments() if spatial.count else None,
        np.concatenate(features),
        np.concatenate(logits) if logits else None,
    )


def holds_statistics(path: Path) -> bool:
    """Whether a file is ``.npz`` with ``mu`` and ``sigma``.

    Raises:
        InputError: it is ``.npz`` by its name, and no archive of arrays.
    """
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    with open_npz(path, "images") as archive:
        return {"mu", "sigma"} <= archive.names


def holds_images(path: Path) -> bool:
    """Whether such a file has images, too."""
    with open_npz(path, "images") as archive:
        return ARRAY in archive.names


def check_images(path: Path) -> None:
    """Refuse real images that cannot be read, as far as that can be told without reading all of them.

    Raises:
        InputError, UsageError: as :func:`~dexport.validate.images.image_sets.open_images`.
    """
    if not holds_statistics(path) or holds_images(path):
        open_images(path)


def read_statistics(path: Path, evaluator: Evaluator) -> Summary:
    """Moments of an ``.npz`` file of ADM or pytorch-fid: ``mu``, ``sigma``, and for sFID ``mu_s``, ``sigma_s``.

    Files of others do not say what made them: they are taken for the FID Inception's.

    Raises:
        InputError: values that are no moments, of another evaluator, or of other weights.
    """
    with open_npz(path, "statistics") as archive:
        names = archive.names
        made_by, made_with = (
            _text(archive, name) if name in names else otherwise
            for name, otherwise in (("evaluator", "inception"), ("weights_sha256", evaluator.sha256))
        )
        _check_maker(path, evaluator, made_by, made_with)
        count = _count(archive) if "count" in names else None
        moments = _moments(archive, "mu", "sigma", count)
        spatial = _moments(archive, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= names else None
    return Summary(moments, spatial)


def _check_maker(path: Path, evaluator: Evaluator, made_by: str, made_with: str) -> None:
    if made_by != evaluator.name:
        raise InputError(
            f"{printable(path)} has statistics of {printable(made_by)}, not of {evaluator.name}",
            hint=f"--evaluator {made_by}, or make them again with --save-stats"
            if made_by in EVALUATORS
            else "make them again with --save-stats",
        )
    if made_with != evaluator.sha256:
        raise InputError(
            f"{printable(path)} was made with weights {printable(made_with[:16])}, these are {evaluator.sha256[:16]}",
            hint="give the same file with --weights, or make the statistics again with --save-stats",
        )


def write_statistics(path: Path, summary: Summary, images: ImageSet, evaluator: Evaluator) -> None:
    """Write ADM's layout: ``mu``, ``sigma``, ``mu_s``, ``sigma_s`` and the images as ``arr_0``.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    arrays: dict[str, Any] = {"mu": summary.moments.mean, "sigma": summary.moments.covariance}
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.covariance}
    arrays |= dict(zip(PROVENANCE, (evaluator.name, evaluator.sha256, summary.moments.count), strict=True))
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (images.count, *images.shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for pixels in images.batches(64):
                member.write(pixels.tobytes())


def _moments(archive: Npz, mean: str, covariance: str, count: int | None) -> Moments:
    """Moments that features can have: what is no mean and covariance gives distances without any meaning."""
    path = printable(archive.path)
    headers = [archive.header(name) for name in (mean, covariance)]
    if any(header.dtype.kind not in NUMBERS for header in headers):
        types = " and ".join(str(header.dtype) for header in headers)
        raise InputError(f"{path}: {mean} and {covariance} are {types}", hint="expected are real numbers")
    shapes = [header.shape for header in headers]
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2 or not 0 < shapes[0][0] <= MOST_FEATURES:
        raise InputError(
            f"{path}: {mean} {list(shapes[0])} and {covariance} {list(shapes[1])} do not fit together",
            hint=f"expected are (D,) and (D, D), D up to {MOST_FEATURES}",
        )
    mu, sigma = (archive.read(name).astype(np.float64) for name in (mean, covariance))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: {mean} or {covariance} has values that are not finite", hint="make it again")
    largest = np.abs(sigma).max()
    if max(largest, np.abs(mu).max()) > LARGEST_VALUE:
        raise InputError(f"{path}: {mean} or {covariance} has values above {LARGEST_VALUE:g}", hint="make it again")
    if np.abs(sigma - sigma.T).max() > ROUNDING * largest or (np.diag(sigma) < -ROUNDING * largest).any():
        raise InputError(
            f"{path}: {covariance} is no covariance: it is not symmetric, or has negative variances",
            hint="make it again",
        )
    return Moments(mu, sigma, count)


def _count(archive: Npz) -> int:
    value = archive.read("count", LARGEST_SCALAR)
    whole = value.ndim == 0 and value.dtype.kind in NUMBERS and np.isfinite(value) and value == np.floor(value)
    if not whole or not 2 <= value <= MOST_IMAGES:
        raise InputError(
            f"{printable(archive.path)}: count is no number of images, of which a covariance needs two or more",
            hint="make it again",
        )
    return int(value)


def _text(archive: Npz, name: str) -> str:
    value = archive.read(name, LARGEST_SCALAR)
    if value.ndim != 0 or value.dtype.kind != "U":
        raise InputError(f"{printable(archive.path)}: {name} is no text", hint="make it again")
    try:
        return str(value)
    except ValueError as error:  # numbers that are no characters
        raise InputError(f"{printable(archive.path)}: {name} is no text", hint="make it again") from error
