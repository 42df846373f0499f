"""Sampled pictures of a long validation in a folder: those that are there already are not made again.

Every set has a folder named after the hash of what fixes it, so runs with other settings do not meet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dexport.hashing import sha256_of
from dexport.image_files import find_images
from dexport.runtime.gallery import open_gallery
from dexport.runtime.generate import run_batches
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES
from dexport.validate.images.image_sets import open_images

DIGITS = 12
"""Of a hash in the name of a folder."""
OnProgress = Callable[[int, int, str], None]


def sample_set(
    program: OpenProgram,
    work: Path,
    side: str,
    settings: Mapping[str, Any],
    labels: Sequence[int],
    *,
    seed: int,
    batch: int,
    on_progress: OnProgress,
) -> Path:
    """A folder with one picture per label, image n from the stream n of the draws; only missing ones are made.

    Args:
        side: ``bundle`` or ``pytorch``.
        settings: everything that fixes the pictures.
        labels: one image each; a program without classes takes as many zeros as images.

    Raises:
        GateError: results that are not finite.
    """
    folder = work / f"{side}-{digest(settings)}"
    given = [None if program.classes is None else label for label in labels]
    with open_gallery(folder, settings, [""] * len(labels)) as gallery:
        missing = gallery.missing()
        made = len(labels) - len(missing)
        on_progress(made, len(labels), f"{side}: {made} of {len(labels)} images")
        for numbers, results in run_batches(program, given, missing, seed, batch):
            for number, image in zip(numbers, results[PICTURES], strict=True):
                gallery.add(number, image)
            made += len(numbers)
            on_progress(made, len(labels), f"{side}: {made} of {len(labels)} images")
    return folder


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
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]
