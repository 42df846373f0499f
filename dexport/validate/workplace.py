"""The folder of a long validation: pictures and features that are there already are not made again.

Every set has a folder named after the hash of what fixes it, so runs with other settings do not meet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dexport.drafts import clear_remains
from dexport.errors import InputError
from dexport.files import replacing
from dexport.hashing import sha256_of
from dexport.image_files import find_images
from dexport.npz import open_npz
from dexport.places import filling
from dexport.runtime.gallery import open_gallery
from dexport.runtime.draws import Draws
from dexport.runtime.pipeline import Pipeline
from dexport.validate.features.evaluator import Evaluator, Features
from dexport.validate.images import ImageSet, open_images

CHUNK = 64
"""Images whose features are stored together: what a killed run loses at most."""
SHOWN = 12
OnProgress = Callable[[int, int, str], None]


def sample_set(
    pipeline: Pipeline,
    work: Path,
    side: str,
    settings: Mapping[str, Any],
    labels: Sequence[int],
    *,
    sampler: str | None,
    steps: int | None,
    cfg_scale: float | None,
    seed: int,
    batch: int,
    on_progress: OnProgress,
) -> Path:
    """A folder with one picture per label, image n from the stream n of the noise; only missing ones are made.

    Args:
        side: ``bundle`` or ``pytorch``.
        settings: everything that fixes the pictures.
        labels: one image each; an unconditional network takes as many zeros as images.

    Raises:
        GateError: latents that are not finite.
    """
    folder = work / f"{side}-{digest(settings)}"
    plan = pipeline.sampler(sampler, steps)
    batch = min(batch, pipeline.largest_batch(cfg_scale) or batch)
    with open_gallery(folder, settings, [""] * len(labels)) as gallery:
        missing = gallery.missing()
        for first in range(0, len(missing), batch):
            numbers = missing[first : first + batch]
            made = len(labels) - len(missing) + first
            on_progress(made, len(labels), f"{side}: {made} of {len(labels)} images")
            some = [labels[number] for number in numbers] if pipeline.classes is not None else []
            latents = pipeline.sample(some, Draws(seed, images=numbers), sampler=plan, cfg_scale=cfg_scale)
            for number, image in zip(numbers, pipeline.images(latents), strict=True):
                gallery.add(number, image)
    return folder


def cached_features(
    images: ImageSet, evaluator: Evaluator, folder: Path, batch: int, on_progress: OnProgress
) -> Iterator[Features]:
    """Features of a set in chunks of ``CHUNK`` images, kept in ``folder``."""
    stored = folder / f"{evaluator.name}-{evaluator.sha256[:SHOWN] or 'no-weights'}"
    with filling(stored):
        clear_remains(stored)
        done = 0
        for number, pixels in enumerate(images.batches(CHUNK)):
            path = stored / f"{number:05d}.npz"
            features = _read(path, len(pixels))
            if features is None:
                on_progress(done, images.count, f"{evaluator.name}: {done} of {images.count} of {images.path.name}")
                parts = [evaluator.extract(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
                features = Features(*map(_joined, zip(*parts, strict=True)))  # type: ignore[arg-type]
                _write(path, features)
            done += len(pixels)
            yield features


def fingerprint(path: Path) -> str:
    """Hash of a file, or of the images in a folder with their names."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        open_images(path)  # says what is wrong
    total = hashlib.sha256()
    for file in find_images(path).files:
        total.update(os.fsencode(file.relative_to(path).as_posix()) + f"\0{sha256_of(file)}\n".encode())
    return total.hexdigest()


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:SHOWN]


def _joined(arrays: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
    return None if arrays[0] is None else np.concatenate(arrays)  # type: ignore[arg-type]


def _read(path: Path, count: int) -> Features | None:
    if not path.exists():
        return None
    try:
        with open_npz(path, "features") as file:
            features = Features(**{name: file.read(name) for name in file.names})
            if any(array is not None and (array.ndim != 2 or array.dtype.kind != "f") for array in features):
                raise TypeError("they are no rows of numbers")
    except TypeError as error:
        raise InputError(f"{path} holds no features: {error}", hint="remove it; it will be made again") from error
    whole = all(array is None or len(array) == count for array in features)
    return features if whole else None


def _write(path: Path, features: Features) -> None:
    with replacing(path) as file:
        np.savez(file, **{name: array for name, array in features._asdict().items() if array is not None})
