"""A file that stays open: what is hashed, what is read and what is checked are the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dexport.errors import InputError
from dexport.hashing import Identity, identity_of, is_regular, sha256_of_open

LARGEST_READ = 1 << 30
"""The kernel reads less than 2 GiB at once."""


class CheckpointFile:
    """A regular file, read at offsets. Exchanging it by a rename does not change what is read here.

    Raises:
        InputError: it cannot be opened, or is a pipe or a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            # A pipe without a writer would wait for one.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            facts = os.fstat(self._descriptor)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}", hint="check the path and its permissions") from error
        if not is_regular(facts):
            raise InputError(f"{path} is not a regular file", hint="give a checkpoint file")
        self.size = facts.st_size
        self._identity: Identity = identity_of(facts)
        self._sha256 = ""

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def sha256(self) -> str:
        """Hexadecimal, of the whole file; computed once."""
        if not self._sha256:
            try:
                self._sha256 = sha256_of_open(self._descriptor)
            except OSError as error:
                raise InputError(f"{self.path} cannot be read: {error}", hint="copy or download it again") from error
        return self._sha256

    def bytes_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes, fewer where the file ends.

        Raises:
            InputError: the disk does not give them.
        """
        try:
            return os.pread(self._descriptor, max(size, 0), offset)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}", hint="copy or download it again") from error

    def read_at(self, offset: int, size: int) -> np.ndarray:
        """uint8 (size,).

        Raises:
            InputError: the file ends before, or cannot be read.
        """
        if not 0 <= offset <= offset + size <= self.size:
            raise InputError(f"{self.path} ends before its data", hint="copy or download it again")
        buffer, done = np.empty(size, np.uint8), 0
        view = buffer.data
        while done < size:
            try:
                got = os.preadv(self._descriptor, [view[done : done + LARGEST_READ]], offset + done)
            except OSError as error:
                raise InputError(f"{self.path} cannot be read: {error}", hint="copy or download it again") from error
            if not got:
                raise InputError(f"{self.path} was cut while it was read", hint="copy or download it again")
            done += got
        return buffer

    def check_unchanged(self) -> None:
        """Raise InputError if the file was written to, exchanged or removed since it was opened."""
        try:
            same = identity_of(os.fstat(self._descriptor)) == identity_of(self.path.stat()) == self._identity
        except OSError:
            same = False
        if not same:
            raise InputError(
                f"{self.path} was changed, exchanged or removed while it was read; nothing made from it was kept",
                hint="run the same command again when nothing writes to it",
            )
