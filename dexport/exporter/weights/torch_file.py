"""PyTorch files as an index of views: the zip format, the one from before version 1.6, and TorchScript."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from dexport.errors import InputError
from dexport.exporter.weights.file import CheckpointFile
from dexport.exporter.weights.stored import Storage, Stored, Strided
from dexport.exporter.weights.torch_names import StorageKind, find
from dexport.exporter.weights.unpickle import LARGEST_PICKLE, ForbiddenError, Machine
from dexport.exporter.weights.zip_archive import WRITE_AGAIN, ZipArchive

INDEX = "data.pkl"
SMALL = 1 << 10
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
COUNT = struct.Struct("<q")
LONGEST_NAME, LONGEST_REASON = 100, 200


class TorchFile(ABC):
    """An index, and the place of each of its storages."""

    def __init__(self, file: CheckpointFile, swap: bool) -> None:
        self.file = file
        self._swap = swap

    @abstractmethod
    def place(self, storage: Storage) -> int:
        """Offset in the file of the storage's first element.

        Raises:
            InputError: it is not there, or shorter than the index says.
        """

    def stored(self, tensor: Strided) -> Stored:
        """Where the tensor's bytes are.

        Raises:
            InputError: not in this file.
        """
        offset = self.place(tensor.storage) + tensor.offset * tensor.dtype.itemsize if tensor.span else 0
        if offset + tensor.span * tensor.dtype.itemsize > self.file.size:
            raise InputError(f"{self.file.path} ends before its data", hint="copy or download it again")
        if self._swap and not tensor.storage.typed:
            raise InputError(
                f"{self.file.path} was written on a big-endian machine with storages that have no type",
                hint=WRITE_AGAIN,
            )
        unit = tensor.storage.dtype.itemsize // (2 if tensor.storage.dtype.is_complex else 1)
        return Stored(
            self.file,
            offset,
            tensor.span,
            tensor.dtype,
            tensor.shape,
            tensor.stride,
            tensor.negative,
            tensor.conjugate,
            swap=unit if self._swap else 0,
        )


class ZipFile(TorchFile):
    """What ``torch.save`` writes today."""

    def __init__(self, archive: ZipArchive) -> None:
        order = archive.read("byteorder", SMALL)
        if order not in (None, b"little", b"big"):
            raise InputError(f"{archive.file.path} says no known byte order", hint=WRITE_AGAIN)
        # Files from before there was a record are little-endian.
        super().__init__(archive.file, swap=(order or b"little").decode() != sys.byteorder)
        alignment = archive.read(".storage_alignment", SMALL)
        if alignment is not None and not (alignment.isdigit() and int(alignment)):
            raise InputError(
                f"{archive.file.path} is not a whole PyTorch checkpoint: its storage alignment is not positive",
                hint="copy or download it again",
            )
        self.archive = archive

    def load(self, find_name: Callable[[str, str], Any] = find) -> Any:
        """The object that was saved."""
        index = self.archive.read(INDEX, LARGEST_PICKLE)
        if index is None:
            raise InputError(
                f"{self.file.path} is a zip archive without a PyTorch checkpoint in it ({INDEX})",
                hint="give a file that torch.save wrote",
            )
        with reading(self.file):
            return Machine(find_name, _storage).load(io.BytesIO(index))

    def place(self, storage: Storage) -> int:
        member = self.archive.find(f"data/{storage.key}")
        size = (storage.start + storage.count) * storage.dtype.itemsize
        if member is None or member.size < size:
            found = "is not there" if member is None else f"has {member.size} bytes"
            raise InputError(
                f"{self.file.path}: the record data/{storage.key:.40} {found}, and the index says {size} bytes",
                hint="copy or download it again",
            )
        return member.offset + storage.start * storage.dtype.itemsize


class LegacyFile(TorchFile):
    """What ``torch.save`` wrote before version 1.6: pickles one after another, then the storages with their lengths."""

    def __init__(self, file: CheckpointFile) -> None:
        head = io.BufferedReader(_Head(file))
        machine = Machine(find, self._remember)
        self._roots: dict[str, Storage] = {}
        self._places: dict[str, int] = {}
        with reading(file):
            magic, version, system = (machine.load(head) for _ in range(3))
            if magic != MAGIC_NUMBER or version != PROTOCOL_VERSION or not isinstance(system, dict):
                raise ValueError("it does not begin as one")
            self._value = machine.load(head)
            keys = machine.load(head)
            if type(keys) is not list or not all(type(key) is str and key in self._roots for key in keys):
                raise ValueError("its list of storages is none")
            # Every machine wrote this format little-endian.
            super().__init__(file, swap=sys.byteorder != "little")
            at = head.tell()
            for key in keys:
                if key in self._places:
                    raise ValueError("its list of storages names one twice")
                storage, count = self._roots[key], COUNT.unpack(file.bytes_at(at, COUNT.size))[0]
                if count != storage.count:
                    raise ValueError(f"a storage has {count} elements, and the index says {storage.count}")
                self._places[key] = at + COUNT.size
                at += COUNT.size + count * storage.dtype.itemsize
            if at > file.size:
                raise ValueError("it ends before its data")

    def load(self) -> Any:
        """The object that was saved."""
        return self._value

    def place(self, storage: Storage) -> int:
        if storage.key not in self._places:
            raise InputError(f"{self.file.path} lacks a storage that its index names", hint="download it again")
        return self._places[storage.key] + storage.start * storage.dtype.itemsize

    def _remember(self, saved: Any) -> Storage:
        storage = _storage(saved[:5])
        root = self._roots.setdefault(storage.key, storage)
        if root.dtype != storage.dtype or root.count != storage.count:
            raise ValueError("one storage has two descriptions")
        view = saved[5] if len(saved) > 5 else None
        if view is None:
            return storage
        _, start, count = view
        part = Strided(storage, storage.dtype, start, (count,), (1,))
        return Storage(storage.key, storage.dtype, count, part.offset, storage.typed)


class _Head(io.RawIOBase):
    """The pickles at the beginning of a file, as far as an index may be long."""

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.bytes_at(self._at, min(len(buffer), LARGEST_PICKLE - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at


def _storage(saved: Any) -> Storage:
    """``("storage", class, key, location, number of elements)``."""
    kind, of, key, _, count = saved
    if kind != "storage" or not isinstance(of, StorageKind) or type(key) is not str or type(count) is not int:
        raise ValueError("a storage is described in another way")
    return Storage(key, of.dtype, count, typed=of.typed)


@contextlib.contextmanager
def reading(file: CheckpointFile) -> Iterator[None]:
    """What a damaged or forbidden index raises becomes an InputError about the file."""
    try:
        yield
    except InputError:
        raise
    except ForbiddenError as error:
        name = str(error).encode("unicode_escape").decode()[:LONGEST_NAME]
        raise InputError(
            f"{file.path} needs to run {name} when it is unpickled; that was refused",
            hint="if you trust its author, convert it once where nothing can be harmed: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=False)[...], 'weights.safetensors')",
        ) from error
    except Exception as error:
        # A damaged file makes the machine raise anything at all.
        reason = re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0]
        reason = reason.encode("unicode_escape").decode()[:LONGEST_REASON]
        raise InputError(
            f"{file.path} is not a whole PyTorch checkpoint: {reason}", hint="copy or download it again"
        ) from error
