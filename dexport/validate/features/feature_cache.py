"""Features of image sets in a folder: those that are there already are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dexport.drafts import clear_remains
from dexport.errors import InputError
from dexport.files import replacing
from dexport.npz import open_npz
from dexport.places import filling
from dexport.validate.features.evaluator import Evaluator, Features
from dexport.validate.images.image_sets import ImageSet

CHUNK = 64
"""Images whose features are stored together: what a killed run loses at most."""
DIGITS = 12
"""Of the weights' hash in the name of a folder."""
OnProgress = Callable[[int, int, str], None]


def cached_features(
    images: ImageSet, evaluator: Evaluator, folder: Path, batch: int, on_progress: OnProgress
) -> Iterator[Features]:
    """Features of a set in chunks of ``CHUNK`` images, kept in ``folder``."""
    stored = folder / f"{evaluator.name}-{evaluator.sha256[:DIGITS] or 'no-weights'}"
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
