"""Hashes of files, also begun before they are needed: one core hashes a checkpoint while another imports torch."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from concurrent.futures import Future
from pathlib import Path

CHUNK, CHUNK_AHEAD = 1 << 20, 32 << 20
"""Bytes read at once. Ahead they are so many that the thread seldom asks for the interpreter, which is busy then."""
Identity = tuple[str, int, int, int]
_begun: dict[Identity, Future[str]] = {}


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    begun = _begun.pop(_identity(path), None)
    return _sha256(path, CHUNK) if begun is None else begun.result()


def hash_ahead(path: str | Path | None) -> None:
    """Begin the hash of a file that :func:`sha256_of` will be asked for; what is no file is left to who opens it."""
    with contextlib.suppress(OSError, ValueError):
        if path is None or not Path(path).is_file():
            return
        found: Future[str] = Future()
        _begun[_identity(Path(path))] = found
        threading.Thread(target=_work, args=(Path(path), found), daemon=True).start()


def _work(path: Path, found: Future[str]) -> None:
    try:
        found.set_result(_sha256(path, CHUNK_AHEAD))
    except OSError as error:
        found.set_exception(error)


def _sha256(path: Path, chunk: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(chunk, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def _identity(path: Path) -> Identity:
    """A file that was replaced or written to is another one."""
    facts = path.stat()
    return str(path.resolve()), facts.st_ino, facts.st_size, facts.st_mtime_ns
