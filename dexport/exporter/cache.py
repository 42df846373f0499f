"""What builds made, by the hash of everything that it depends on: an unchanged step is copied, not repeated.

    <cache>/<key>/entry.json     size and sha256 of each file, and what the step reported
    <cache>/<key>/...            the files

An entry is written to a temporary sibling and renamed, so that a killed build leaves none and of two builds that make
the same one wins. Files are hashed while they are copied out: a damaged entry is removed and the step runs. Nothing
that goes wrong here stops a build: a lock that is not let go of is waited for so long, then there is no cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from dexport.drafts import LiveFolder, clear_remains
from dexport.errors import MachineError, UsageError
from dexport.files import move_new, open_regular
from dexport.locks import PATIENCE_S, open_lock, wait_for_lock

FOLDER_VARIABLE = "DEXPORT_CACHE"
LIMIT_VARIABLE = "DEXPORT_CACHE_GB"
WAIT_VARIABLE = "DEXPORT_CACHE_WAIT"
DEFAULT_LIMIT_GB = 20.0
ENTRY = "entry.json"
LARGEST_ENTRY = 64 << 20
LOCK = ".lock"
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


class LockedError(Exception):
    """Another process does not let go of the cache."""


class Cache:
    """A folder of entries, the least recently used of which make place for new ones.

    Args:
        limit: bytes that all entries together may take.
        wait: seconds for which another process may hold the cache.
    """

    def __init__(self, folder: Path, limit: int, wait: float = PATIENCE_S) -> None:
        self.folder = folder
        self.limit = limit
        self.wait = wait
        self._given_up = False

    def take(self, key: str, into: Path) -> Any | None:
        """Copy an entry's files below ``into``; returns what the step reported.

        None where there is no whole entry, which is then removed, and where it cannot be copied, as onto a full disk.
        """
        entry = self.folder / key
        if self._given_up or not entry.is_dir():
            return None
        copied: list[Path] = []
        try:
            with self._locked(shared=True):
                if entry.is_symlink():
                    raise DamagedError("a link")
                document = _read_entry(entry)
                if document["format"] != FORMAT or document["key"] != key or document["sha256"] != _digest(document):
                    raise DamagedError(ENTRY)
                for name, facts in document["files"].items():
                    if not _lies_in(entry, name):
                        raise DamagedError(name)
                    target = into / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    copied.append(target)
                    if _copy(entry / name, target) != facts["sha256"]:
                        raise DamagedError(name)
                os.utime(entry / ENTRY)
        except LockedError:
            return None
        except (DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            for path in copied:
                path.unlink(missing_ok=True)
            is_damage = isinstance(error, (FileNotFoundError, IsADirectoryError)) or not isinstance(error, OSError)
            if not is_damage and _is_plain(entry):
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
            if self._given_up or size > self.limit or (self.folder / key).exists():
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_remains(self.folder)
            self.prune(self.limit - size)
            if shutil.disk_usage(self.folder).free < 2 * size:
                return
            live = LiveFolder(self.folder / key)
            try:
                draft, files = live.path, {}
                for name in names:
                    (draft / name).parent.mkdir(parents=True, exist_ok=True)
                    files[name] = {"size": (root / name).stat().st_size, "sha256": _copy(root / name, draft / name)}
                document = {"format": FORMAT, "key": key, "label": label, "files": files, "report": report}
                document["sha256"] = _digest(document)
                (draft / ENTRY).write_text(json.dumps(document), encoding="utf-8")
                with contextlib.suppress(FileExistsError):  # another build may have been faster
                    move_new(draft, self.folder / key)
                    live.release()
            finally:
                live.discard()
        except LockedError:
            return
        except OSError as error:
            logger.warning("not kept in the cache %s: %s", self.folder, error)

    def entries(self) -> list[Kept]:
        """All entries, the most recently used first."""
        found = []
        for path in self.folder.glob("[!.]*") if self.folder.is_dir() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                document = _read_entry(path)
                size = sum(facts["size"] for facts in document["files"].values())
                used = (path / ENTRY).stat().st_mtime
                found.append(Kept(path.name, str(document["label"]), size, used, path))
        return sorted(found, key=lambda kept: kept.used, reverse=True)

    def prune(self, limit: int = 0) -> list[Kept]:
        """Remove the least recently used entries until the rest takes at most ``limit`` bytes; returns what went.

        Raises:
            LockedError: another process does not let go of the cache.
        """
        total, removed = 0, []
        for kept in self.entries():
            total += kept.size
            if total > limit:
                self._remove(kept.path)
                removed.append(kept)
        if not limit:
            clear_remains(self.folder)
        return removed

    def _remove(self, entry: Path) -> None:
        """Rename first, so that nobody sees half an entry."""
        with contextlib.suppress(OSError), self._locked(shared=False):
            gone = LiveFolder(entry)
            try:
                entry.rename(gone.path / entry.name)
            finally:
                gone.discard()

    @contextlib.contextmanager
    def _locked(self, *, shared: bool) -> Iterator[None]:
        """Removing waits for copying. The kernel drops the lock of a killed process, but not of one that was stopped.

        Raises:
            LockedError: it waited in vain, which it does once.
        """
        lock = self.folder / LOCK
        descriptor = open_lock(lock)
        try:
            if self._given_up or not wait_for_lock(descriptor, self.wait, shared=shared, on_wait=self._tell):
                if not self._given_up:
                    logger.warning("%s is still held: going on without the cache", lock)
                self._given_up = True
                raise LockedError(f"{lock} is held by another process, which may be stopped")
            yield
        finally:
            os.close(descriptor)

    def _tell(self) -> None:
        logger.warning(
            "waiting up to %g s (%s) for another process that holds %s", self.wait, WAIT_VARIABLE, self.folder / LOCK
        )


def open_cache() -> Cache | None:
    """The cache of this user: ``DEXPORT_CACHE``, or ``dexport`` in the XDG cache folder.

    None where ``DEXPORT_CACHE`` is empty, and where this user has no home.

    Raises:
        UsageError: ``DEXPORT_CACHE_GB`` or ``DEXPORT_CACHE_WAIT`` is not a number.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    limit = int(_number(LIMIT_VARIABLE, DEFAULT_LIMIT_GB, "gigabytes, such as 20") * 1e9)
    wait = _number(WAIT_VARIABLE, PATIENCE_S, "seconds, such as 60")
    if named == "":
        return None
    if named is None:
        try:
            named = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dexport")
        except RuntimeError:  # neither HOME nor an entry in the list of users, as in a container
            return None
    return Cache(Path(named).absolute(), limit, wait)


def _number(variable: str, default: float, such_as: str) -> float:
    text = os.environ.get(variable, "") or str(default)
    with contextlib.suppress(ValueError):
        number = float(text)
        if 0 <= number < math.inf:
            return number
    raise UsageError(f"{variable}={text} is not a number", hint=f"give {such_as}")


def existing_cache() -> Cache:
    """The cache, for commands about it.

    Raises:
        MachineError: it is switched off, or this user has no home.
    """
    cache = open_cache()
    if cache is None and FOLDER_VARIABLE not in os.environ:
        raise MachineError("there is no home folder to keep a cache in", hint=f"name a folder: {FOLDER_VARIABLE}=DIR")
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


def _read_entry(entry: Path) -> dict[str, Any]:
    """Its description.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is none.
    """
    with open_regular(entry / ENTRY, follow=False) as file:
        content = file.read(LARGEST_ENTRY + 1)
    if len(content) > LARGEST_ENTRY:
        raise ValueError(f"{ENTRY} is too large")
    return json.loads(content)


def _lies_in(entry: Path, name: str) -> bool:
    """Whether a name is that of a regular file in an entry, which no link leads out of."""
    path = entry / name
    return path.is_file() and path.resolve() == entry.resolve() / name


def _is_plain(entry: Path) -> bool:
    """Whether an entry is made of files and folders only, so that what went wrong was the copying."""
    with contextlib.suppress(OSError):
        kinds = {stat.S_IFMT(path.lstat().st_mode) for path in (entry, *entry.rglob("*"))}
        return kinds <= {stat.S_IFREG, stat.S_IFDIR}
    return True


def _copy(source: Path, target: Path) -> str:
    """Copy a file, never link it, and return its sha256."""
    digest = hashlib.sha256()
    with open_regular(source) as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()
