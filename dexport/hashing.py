"""Hashes of files, also begun before they are needed: one core hashes a checkpoint while another imports torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from concurrent.futures import Future
from pathlib import Path

CHUNK, CHUNK_AHEAD = 1 << 20, 32 << 20
"""Bytes read at once. Ahead they are so many that the thread seldom asks for the interpreter, which is busy then."""
Identity = tuple[int, int, int, int, int]
_begun: dict[Identity, Future[str]] = {}


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb", buffering=0) as file:
        return sha256_of_open(file.fileno())


def sha256_of_open(descriptor: int) -> str:
    """Hexadecimal sha256 of the whole of an open file, whatever its path names by now."""
    begun = _begun.pop(identity_of(os.fstat(descriptor)), None)
    return _sha256(descriptor, CHUNK) if begun is None else begun.result()


def hash_ahead(path: str | Path | None) -> None:
    """Begin the hash of a file that :func:`sha256_of` will be asked for; what is no file is left to who opens it."""
    with contextlib.suppress(OSError, ValueError):
        if path is None or not Path(path).is_file():
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found: Future[str] = Future()
        _begun[identity_of(os.fstat(descriptor))] = found
        threading.Thread(target=_work, args=(descriptor, found), daemon=True).start()


def identity_of(facts: os.stat_result) -> Identity:
    """A file that was replaced or written to is another one, also where its time was set back."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def is_regular(facts: os.stat_result) -> bool:
    """Whether it can be read at any offset, which a pipe or a device cannot."""
    return stat.S_ISREG(facts.st_mode)


def _work(descriptor: int, found: Future[str]) -> None:
    try:
        found.set_result(_sha256(descriptor, CHUNK_AHEAD))
    except OSError as error:
        found.set_exception(error)
    finally:
        os.close(descriptor)


def _sha256(descriptor: int, chunk: int) -> str:
    """Reads at offsets, so that others may read through the same descriptor."""
    digest, offset = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(chunk, os.fstat(descriptor).st_size + 1)))
    while read := os.preadv(descriptor, [buffer], offset):
        digest.update(buffer[:read])
        offset += read
    return digest.hexdigest()
