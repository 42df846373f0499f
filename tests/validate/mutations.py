"""Mutated images and arrays, for tests and fuzzers: ``(rng, folder)``; all but a DexportError is a finding."""

from __future__ import annotations

import contextlib
import functools
import io
import zipfile
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from dexport.errors import DexportError
from dexport.validate.features.evaluator import open_evaluator
from dexport.validate.features.statistics import check_images, read_statistics
from dexport.validate.fid import measure_fid
from dexport.validate.images.image_sets import open_images
from tools.mutate import damaged

SHAPE = (8, 8, 3)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Files of every form and mode, all of one size."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, SHAPE, dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    made: list[tuple[Image.Image, str, dict[str, object]]] = [
        (colours, "PNG", {"exif": exif}),
        (colours.convert("L"), "PNG", {}),
        (colours.quantize(4), "PNG", {"transparency": 0}),
        (colours.convert("RGBA"), "PNG", {}),
        (colours, "PNG", {"save_all": True, "append_images": [colours.rotate(90)]}),
        (colours, "JPEG", {"exif": exif}),
        (colours.convert("CMYK"), "JPEG", {}),
        (colours, "WEBP", {"lossless": True, "exif": exif}),
        (colours.convert("RGBA"), "WEBP", {}),
    ]
    return tuple(_encoded(image, form, **options) for image, form, options in made)


@functools.cache
def archives() -> tuple[bytes, ...]:
    """Sets of images and statistics, stored and compressed."""
    rng = np.random.default_rng(0)
    arrays = {"arr_0": rng.integers(0, 256, (4, *SHAPE), dtype=np.uint8)}
    moments = {"mu": np.zeros(192), "sigma": np.eye(192), "evaluator": "pixels", "weights_sha256": "", "count": 9}
    files = []
    for content in (arrays, moments, arrays | moments):
        for save in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            save(file, **content)  # type: ignore[arg-type]
            files.append(file.getvalue())
    return tuple(files)


def read_mutated_picture(rng: Random, folder: Path) -> None:
    """A folder with one damaged picture: it is read as pixels, or refused."""
    path = folder / rng.choice(("a.png", "a.JPG", "a.webp"))
    path.write_bytes(damaged(rng, rng.choice(pictures())))
    try:
        with contextlib.suppress(DexportError):
            for batch in open_images(folder).batches(2):
                assert batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] in (1, 3)
    finally:
        path.unlink()


def read_mutated_npz(rng: Random, folder: Path) -> None:
    """A damaged ``.npz``, or a whole one with a damaged member: images or statistics, or refused."""
    path = folder / "a.npz"
    good = rng.choice(archives())
    path.write_bytes(_rezipped(rng, good) if rng.random() < 0.7 else damaged(rng, good))
    evaluator = open_evaluator("pixels")
    uses = (check_images, lambda path: read_statistics(path, evaluator), _measured, _batches)
    for use in uses:
        with contextlib.suppress(DexportError):
            use(path)


def _measured(path: Path) -> None:
    report = measure_fid(path, path, evaluator="pixels")
    assert np.isfinite(report.frechet)


def _batches(path: Path) -> None:
    for batch in open_images(path).batches(3):
        assert batch.dtype == np.uint8


def _rezipped(rng: Random, good: bytes) -> bytes:
    source, file = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
    target = rng.choice(source.namelist())
    with zipfile.ZipFile(file, "w", source.infolist()[0].compress_type) as made:
        for name in source.namelist():
            content = source.read(name)
            if name == target and rng.random() < 0.5:  # in its header, of which most bytes matter
                content = damaged(rng, content[:128]) + content[128:]
            elif name == target:
                content = damaged(rng, content)
            made.writestr(name, content)
    return file.getvalue()


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
