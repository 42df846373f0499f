"""What builds made, by the hash of everything that it depends on: an unchanged step is copied, not repeated.

    <cache>/<key>/entry.json     size and sha256 of each file, and what the step reported
    <cache>/<key>/...            the files

An entry is written to a temporary sibling and renamed, so that a killed build leaves none and of two builds that make
the same one wins. Files are hashed while they are copied out: a damaged entry is removed and the step runs. Nothing
that goes wrong here stops a build.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from dexport.bundle import is_running
from dexport.errors import MachineError, UsageError

FOLDER_VARIABLE = "DEXPORT_CACHE"
LIMIT_VARIABLE = "DEXPORT_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
ENTRY = "entry.json"
LOCK = ".lock"
PARTIAL = ".partial-"
CHUNK = 4 << 20
FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """One entry: what it is, its size in bytes and when it was last used, in seconds since 1970."""

    key: str
    label: str
    size: int
    used: float
    path: Path


class DamagedError(Exception):
    """An entry is not what was written."""


class Cache:
    """A folder of entries, the least recently used of which make place for new ones.

    Args:
        limit: bytes that all entries together may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def take(self, key: str, into: Path) -> Any | None:
        """Copy an entry's files below ``into``; returns what the step reported.

        None where there is no whole entry, which is then removed, and where it cannot be copied, as onto a full disk.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        copied: list[Path] = []
        try:
            with self._locked(fcntl.LOCK_SH):
                document = json.loads((entry / ENTRY).read_text(encoding="utf-8"))
                if document["format"] != FORMAT or document["key"] != key or document["sha256"] != _digest(document):
                    raise DamagedError(ENTRY)
                for name, facts in document["files"].items():
                    target = into / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    copied.append(target)
                    if _copy(entry / name, target) != facts["sha256"]:
                        raise DamagedError(name)
                os.utime(entry / ENTRY)
        except (DamagedError, OSError, ValueError, KeyError, TypeError) as error:
            for path in copied:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                logger.warning("cache entry %s was not used: %s", entry, error)
            else:
                logger.warning("cache entry %s is damaged (%s) and was removed", entry, error)
                self._remove(entry)
            return None
        return document["report"]

    def keep(self, key: str, label: str, root: Path, names: list[str], report: Any) -> None:
        """Store files below ``root`` and a report of JSON values. A full or forbidden disk is not an error."""
        try:
            size = sum((root / name).stat().st_size for name in names)
            if size > self.limit or (self.folder / key).exists():
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_remains()
            self.prune(self.limit - size)
            if shutil.disk_usage(self.folder).free < 2 * size:
                return
            draft = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=self.folder))
            try:
                files = {}
                for name in names:
                    (draft / name).parent.mkdir(parents=True, exist_ok=True)
                    files[name] = {"size": (root / name).stat().st_size, "sha256": _copy(root / name, draft / name)}
                document = {"format": FORMAT, "key": key, "label": label, "files": files, "report": report}
                document["sha256"] = _digest(document)
                (draft / ENTRY).write_text(json.dumps(document), encoding="utf-8")
                if not (self.folder / key).exists():  # another build may have been faster
                    draft.rename(self.folder / key)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            logger.warning("not kept in the cache %s: %s", self.folder, error)

    def entries(self) -> list[Kept]:
        """All entries, the most recently used first."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                document = json.loads((path / ENTRY).read_text(encoding="utf-8"))
                size = sum(facts["size"] for facts in document["files"].values())
                used = (path / ENTRY).stat().st_mtime
                found.append(Kept(path.name, str(document["label"]), size, used, path))
        return sorted(found, key=lambda kept: kept.used, reverse=True)

    def prune(self, limit: int = 0) -> list[Kept]:
        """Remove the least recently used entries until the rest takes at most ``limit`` bytes; returns what went."""
        total, removed = 0, []
        for kept in self.entries():
            total += kept.size
            if total > limit:
                self._remove(kept.path)
                removed.append(kept)
        if not limit:
            self._clear_remains()
        return removed

    def _remove(self, entry: Path) -> None:
        """Rename first, so that nobody sees half an entry."""
        with contextlib.suppress(OSError), self._locked(fcntl.LOCK_EX):
            gone = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=self.folder))
            with contextlib.suppress(OSError):
                entry.rename(gone / entry.name)
            shutil.rmtree(gone, ignore_errors=True)

    def _clear_remains(self) -> None:
        """Remove what killed builds left behind."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            pid = path.name.removeprefix(PARTIAL).partition("-")[0]
            if not (pid.isdecimal() and is_running(int(pid))):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Removing waits for copying. The kernel drops the lock of a killed process."""
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, kind)
            yield


def open_cache() -> Cache | None:
    """The cache of this user: ``DEXPORT_CACHE``, or ``dexport`` in the XDG cache folder; None where that is empty.

    Raises:
        UsageError: ``DEXPORT_CACHE_GB`` is not a number.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{LIMIT_VARIABLE}={text} is not a number", hint="give gigabytes, such as 20") from error
    return Cache(Path(named or Path(home) / "dexport").absolute(), limit)


def existing_cache() -> Cache:
    """The cache, for commands about it.

    Raises:
        MachineError: it is switched off.
    """
    cache = open_cache()
    if cache is None:
        raise MachineError(f"the cache is switched off: {FOLDER_VARIABLE} is empty", hint=f"unset {FOLDER_VARIABLE}")
    return cache


def key_of(facts: Mapping[str, Any]) -> str:
    """Hash of JSON values, of the code here, and of every installed package's version."""
    document = {"format": FORMAT, "facts": facts, "code": _code(), "packages": _packages()}
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Hash of this package's sources and tables."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for suffix in ("py", "toml") for p in root.rglob(f"*.{suffix}")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _packages() -> list[str]:
    return [platform.python_version(), *sorted(f"{d.name} {d.version}" for d in distributions())]


def _digest(document: Mapping[str, Any]) -> str:
    content = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _copy(source: Path, target: Path) -> str:
    """Copy a file, never link it, and return its sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()
