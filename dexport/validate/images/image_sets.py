"""Sets of images on disk, read a batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dexport.errors import InputError, UsageError
from dexport.image_files import LARGEST_PIXELS, Skipped, find_images, read_header, read_image
from dexport.npz import Values, open_npz
from dexport.printable import printable
from dexport.validate.distances.pixels import ARRAY

CHANNELS = (1, 3)
LARGEST_BATCH = 1 << 28
"""Bytes of images that are held at once, however many were asked for."""


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        path: the folder or file.
        count: how many.
        shape: (H, W, C) of each, C is 1 or 3.
        skipped: what else there is, and is not counted.
        warnings: what a reader of distances should know.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, as uint8 (up to ``size``, H, W, C); fewer at once where they are large."""

    def _at_once(self, size: int) -> int:
        return max(1, min(size, LARGEST_BATCH // int(np.prod(self.shape))))


class Folder(ImageSet):
    """The PNG, JPEG and WebP files in a folder and below it, in the order of their paths; see :func:`find_images`.

    Every header is read at once, so that a file which is no picture of this set is found before any work.
    """

    def __init__(self, path: Path) -> None:
        found = find_images(path)
        self.path, self.files, self.skipped = path, found.files, found.skipped
        if not self.files:
            others = f"; it has {', '.join(map(str, found.skipped))}" if found.skipped else ""
            raise InputError(
                f"{printable(path)} holds no PNG files and no JPEG or WebP files{others}",
                hint="give a folder of pictures, or an .npz with arr_0",
            )
        self.count = len(self.files)
        turned = 0
        for number, file in enumerate(self.files):
            header = read_header(file)
            if number == 0:
                self.shape = header.shape
            self._check(file, header.shape)
            turned += header.turned
        if turned:
            self.warnings = (
                f"{printable(path)}: {turned} images have an EXIF orientation, which is not applied: "
                "their pixels count as they are stored",
            )

    def batches(self, size: int) -> Iterator[np.ndarray]:
        size = self._at_once(size)
        for start in range(0, self.count, size):
            yield np.stack([self._read(file) for file in self.files[start : start + size]])

    def _read(self, file: Path) -> np.ndarray:
        image = read_image(file)
        self._check(file, image.shape)
        return image

    def _check(self, file: Path, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise InputError(
                f"{printable(file)} is {_size(shape)}, but {printable(self.files[0])} is {_size(self.shape)}",
                hint="a set has one size and one number of channels; resize the images first",
            )


class Array(ImageSet):
    """``arr_0`` (N, H, W, C) uint8 of an ``.npz`` file, read as a stream: ADM's 50,000 samples take 10 GB unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as (_, shape):
            self.count, self.shape = shape[0], shape[1:]  # type: ignore[assignment]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        size = self._at_once(size)
        with self._open() as (values, shape):
            per_image = int(np.prod(shape[1:]))
            for start in range(0, self.count, size):
                count = min(size, self.count - start)
                yield np.frombuffer(values.read(count * per_image), np.uint8).reshape(count, *shape[1:])

    @contextmanager
    def _open(self) -> Iterator[tuple[Values, tuple[int, ...]]]:
        with open_npz(self.path, "images") as archive:
            header = archive.header(ARRAY)
            shape = header.shape
            usual = header.dtype == np.uint8 and len(shape) == 4 and 0 not in shape and not header.fortran_order
            if not usual or shape[3] not in CHANNELS or shape[1] * shape[2] > LARGEST_PIXELS:
                order = " in Fortran order" if header.fortran_order else ""
                raise InputError(
                    f"{printable(self.path)}: {ARRAY} is {header.dtype} {list(shape)}{order}",
                    hint="give images (N, H, W, 1 or 3) uint8 in C order, of 8192x8192 pixels at most",
                )
            with archive.stream(ARRAY, header) as values:
                yield values, shape


def open_images(path: Path) -> ImageSet:
    """A folder of PNG, JPEG and WebP files, or an ``.npz`` file with ``arr_0``.

    Raises:
        InputError: nothing that holds images of one size.
        UsageError: no such path, or another kind of file.
    """
    shown = printable(path)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UsageError(f"{shown} does not exist", hint="give a folder of PNG files, or an .npz file")
    if path.suffix.lower() != ".npz":
        raise UsageError(f"{shown} is neither a folder nor an .npz file", hint="give one of these")
    return Array(path)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} with {shape[2]} channels"
