"""Sets of images on disk, read a batch at a time."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from dexport.errors import InputError, UsageError

ARRAY = "arr_0.npy"
"""Inside the ``.npz`` files of ADM and of ``numpy.savez(path, images)``."""
CHANNELS = (1, 3)


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        path: the folder or file.
        count: how many.
        shape: (H, W, C) of each, C is 1 or 3.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]

    @abstractmethod
    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, as uint8 (up to ``size``, H, W, C)."""


class Folder(ImageSet):
    """The PNG files in a folder and below it, in the order of their paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = sorted(file for file in path.rglob("*.png") if file.is_file())
        if not self._files:
            raise InputError(f"{path} holds no PNG files", hint="give a folder of PNG files, or an .npz with arr_0")
        self.count = len(self._files)
        self.shape = _read_png(self._files[0]).shape

    def batches(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, size):
            yield np.stack([self._read(file) for file in self._files[start : start + size]])

    def _read(self, file: Path) -> np.ndarray:
        image = _read_png(file)
        if image.shape != self.shape:
            raise InputError(
                f"{file} is {_size(image.shape)}, but {self._files[0]} is {_size(self.shape)}",
                hint="a set has one size and one number of channels; resize the images first",
            )
        return image


class Array(ImageSet):
    """``arr_0`` (N, H, W, C) uint8 of an ``.npz`` file, read as a stream: ADM's 50,000 samples take 10 GB unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as (_, shape):
            self.count, self.shape = shape[0], shape[1:]  # type: ignore[assignment]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        with self._open() as (stream, shape):
            per_image = int(np.prod(shape[1:]))
            for start in range(0, self.count, size):
                count = min(size, self.count - start)
                data = stream.read(count * per_image)
                if len(data) < count * per_image:
                    raise InputError(f"{self.path} ends after {start} of {self.count} images", hint="copy it again")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(ARRAY) as stream:
                version = np.lib.format.read_magic(stream)
                is_first = version == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
                shape, fortran_order, dtype = read_header(stream)
                if dtype != np.uint8 or len(shape) != 4 or shape[3] not in CHANNELS or fortran_order or 0 in shape:
                    order = " in Fortran order" if fortran_order else ""
                    raise InputError(
                        f"{self.path}: arr_0 is {dtype} {list(shape)}{order}",
                        hint="give images (N, H, W, 1 or 3) uint8 in C order",
                    )
                yield stream, shape
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self.path} holds no images: {error}", hint="give an .npz with arr_0 (N, H, W, C) uint8"
            ) from error


def open_images(path: Path) -> ImageSet:
    """A folder of PNG files, or an ``.npz`` file with ``arr_0``.

    Raises:
        InputError: nothing that holds images of one size.
        UsageError: no such path, or another kind of file.
    """
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist", hint="give a folder of PNG files, or an .npz file")
    if path.suffix != ".npz":
        raise UsageError(f"{path} is neither a folder nor an .npz file", hint="give one of these")
    return Array(path)


def _read_png(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode == "P" and "transparency" not in image.info:
                return np.asarray(image.convert("RGB"))
            if image.mode not in ("L", "RGB"):
                raise InputError(
                    f"{file} is {image.mode}, not 8-bit grey or RGB", hint="flatten transparency and convert it first"
                )
            array = np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(f"{file} is not a whole PNG file: {error}", hint="remove it or make it again") from error
    return array[..., None] if array.ndim == 2 else array


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} with {shape[2]} channels"
