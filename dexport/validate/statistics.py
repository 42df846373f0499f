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
from dexport.validate.distances import Moments, RunningMoments
from dexport.validate.features.evaluator import Evaluator
from dexport.validate.images import ARRAY, ImageSet

OnProgress = Callable[[int, int, str], None]
PROVENANCE = ("evaluator", "weights_sha256", "count")
"""Keys that we add to ADM's; its evaluator reads those it knows and no others."""


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
    """Whether a file is ``.npz`` with ``mu`` and ``sigma``."""
    return path.suffix == ".npz" and zipfile.is_zipfile(path) and {"mu.npy", "sigma.npy"} <= _names(path)


def holds_images(path: Path) -> bool:
    """Whether such a file has images, too."""
    return ARRAY in _names(path)


def read_statistics(path: Path, evaluator: Evaluator) -> Summary:
    """Moments of an ``.npz`` file of ADM or pytorch-fid: ``mu``, ``sigma``, and for sFID ``mu_s``, ``sigma_s``.

    Files of others do not say what made them: they are taken for the FID Inception's.

    Raises:
        InputError: values that are no moments, of another evaluator, or of other weights.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = set(file.files)
            arrays = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s", *PROVENANCE) if key in keys}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="copy or make it again") from error
    made_by = str(arrays.get("evaluator", "inception"))
    if made_by != evaluator.name:
        raise InputError(
            f"{path} has statistics of {made_by}, not of {evaluator.name}",
            hint=f"--evaluator {made_by}, or make them again with --save-stats",
        )
    made_with = str(arrays.get("weights_sha256", evaluator.sha256))
    if made_with != evaluator.sha256:
        raise InputError(
            f"{path} was made with weights {made_with[:16]}, these are {evaluator.sha256[:16]}",
            hint="give the same file with --weights, or make the statistics again with --save-stats",
        )
    count = int(arrays["count"]) if "count" in arrays else None
    moments = _moments(path, arrays, "mu", "sigma", count)
    spatial = _moments(path, arrays, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= set(arrays) else None
    return Summary(moments, spatial)


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
        with archive.open(ARRAY, "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (images.count, *images.shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for pixels in images.batches(64):
                member.write(pixels.tobytes())


def _moments(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str, count: int | None) -> Moments:
    mu, sigma = arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(
            f"{path}: {mean} {list(mu.shape)} and {covariance} {list(sigma.shape)} do not fit together",
            hint="expected are (D,) and (D, D)",
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: {mean} or {covariance} has values that are not finite", hint="make it again")
    return Moments(mu, sigma, count)


def _names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())
