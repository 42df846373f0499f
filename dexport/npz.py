"""Arrays of ``.npz`` files that others made: nothing is unpacked before its size is known to be right and bounded."""

from __future__ import annotations

import io
import math
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dexport.errors import InputError
from dexport.places import open_input
from dexport.printable import printable

SUFFIX = ".npy"
LARGEST_HEADER = 1 << 14
"""Bytes of an array's header that are looked at; numpy's own take a few hundred."""
LARGEST_ARRAY = 1 << 31
"""Bytes that are read into memory, unless a caller allows less."""
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
"""Pictures and features do not shrink so far: an array above both is a few MB that unpack to many GB."""
READ = 1 << 24
KINDS = "biufcSU"
"""Numbers and texts. Objects are pickles, which run code, and records have no use here."""
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """Of one array; ``start`` is where its values begin in the member."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    start: int

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """An ``.npz`` file that is open for reading; see :func:`open_npz`."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, what: str) -> None:
        self.path = path
        self._archive = archive
        self._what = what
        self._members = {info.filename: info for info in archive.infolist()}

    @property
    def names(self) -> set[str]:
        """Of the arrays, without a suffix."""
        return {name.removesuffix(SUFFIX) for name in self._members if name.endswith(SUFFIX)}

    def header(self, name: str) -> Header:
        """Shape and dtype of an array, which its member has exactly the bytes for.

        Raises:
            InputError: no such array, no numbers and no text, or a size that cannot be.
        """
        with _reading(self.path, self._what):
            info = self._member(name)
            with self._archive.open(info) as stream:
                head = io.BytesIO(stream.read(LARGEST_HEADER))
            version = np.lib.format.read_magic(head)
            if version not in HEADERS:
                raise ValueError(f"{name} has version {version} of the format")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of how Python 2 wrote numbers
                shape, fortran_order, dtype = HEADERS[version](head)
            if dtype.kind not in KINDS or dtype.itemsize == 0 or dtype.subdtype is not None:
                raise ValueError(f"{name} holds {printable(dtype)}, not numbers")
            if any(type(side) is not int or side < 0 for side in shape):
                raise ValueError(f"{name} has the shape {shape}")
            header = Header(shape, dtype, fortran_order, head.tell())
            if header.size != info.file_size - header.start:
                raise ValueError(
                    f"{name} is {dtype} {list(shape)}, {header.size:,} bytes, "
                    f"and the file has {info.file_size - header.start:,} of it"
                )
        return header

    def read(self, name: str, largest: int = LARGEST_ARRAY) -> np.ndarray:
        """An array, in the byte order of this machine.

        Args:
            largest: bytes that it may have.

        Raises:
            InputError: as :meth:`header`, a larger one, or values that are cut short or damaged.
        """
        header = self.header(name)
        if header.size > largest:
            raise InputError(
                f"{printable(self.path)}: {name} is {header.dtype} {list(header.shape)}, {header.size:,} bytes; "
                f"{largest:,} are read at most",
                hint=f"give a file with {self._what} of a usual size",
            )
        array = np.empty(header.shape, header.dtype, order="F" if header.fortran_order else "C")
        values = array.reshape(-1, order="A").view(np.uint8)
        with self.stream(name, header) as stream, _reading(self.path, self._what):
            for start in range(0, header.size, READ):
                part = stream.read(min(READ, header.size - start))
                values[start : start + len(part)] = np.frombuffer(part, np.uint8)
        array = array.astype(header.dtype.newbyteorder("="), copy=False)
        with _reading(self.path, self._what):
            if array.dtype.kind == "U" and array.reshape(-1).view(np.uint32).max(initial=0) > sys.maxunicode:
                raise ValueError(f"{name} is no text")  # numpy would make strings of it that crash what prints them
        return array

    @contextmanager
    def stream(self, name: str, header: Header) -> Iterator[Values]:
        """The values of an array, to read in parts."""
        with _reading(self.path, self._what):
            stream = self._archive.open(self._member(name))
            stream.read(header.start)
        with stream:
            yield Values(stream, self.path, self._what)

    def _member(self, name: str) -> zipfile.ZipInfo:
        info = self._members.get(name + SUFFIX)
        if info is None:
            raise ValueError(f"it has no {name}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in a way that numpy does not write")
        if info.file_size > max(BOMB_BYTES, BOMB_RATIO * info.compress_size):
            raise ValueError(f"{name} would unpack from {info.compress_size:,} bytes to {info.file_size:,}")
        return info


class Values:
    """Bytes of an array."""

    def __init__(self, stream: IO[bytes], path: Path, what: str) -> None:
        self._stream, self._path, self._what = stream, path, what

    def read(self, size: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            InputError: the file is cut short or damaged.
        """
        with _reading(self._path, self._what):
            data = self._stream.read(size)
            if len(data) < size:
                raise ValueError("it is cut short")
        return data


@contextmanager
def open_npz(path: Path, what: str) -> Iterator[Npz]:
    """Open an ``.npz`` file; every problem with it is an InputError that names it.

    Args:
        what: it is expected to hold, for messages.

    Raises:
        InputError: no regular file, no zip archive, or one in which two arrays have one name.
    """
    try:
        file = open_input(path)
    except InputError as error:
        raise InputError(f"{printable(path)} holds no {what}: {error}", hint=error.hint) from error
    with file:
        with _reading(path, what):
            archive = zipfile.ZipFile(file)
            (name, count), *_ = Counter(archive.namelist()).most_common(1) or [("", 0)]
            if count > 1:
                raise ValueError(f"it holds {printable(name)} {count} times")
        with archive:
            yield Npz(archive, path, what)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Of damaged archives, zipfile and numpy raise anything at all.
        reason = printable((str(error) or type(error).__name__).splitlines()[0])
        raise InputError(
            f"{printable(path)} holds no {what}: {reason}", hint="copy it again, or make it again"
        ) from error
