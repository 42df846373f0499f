"""Locks on open files (flock): the kernel drops them with the process, whatever its number and whichever its container.

Where a file system has no such locks, as some network ones, everybody goes on without: what must not be lost is held by
renames that refuse to replace (:mod:`dexport.files`), and nobody takes a live process for a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dexport.errors import MachineError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

PATIENCE_S = 60.0
"""How long to wait for a lock that is held for the blink of a rename: longer, and its process was stopped."""
POLL_S = 0.02
QUIET_S = 1.0
"""A wait that is longer is announced."""
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
OPENING = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file; False where somebody else holds it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def wait_for_lock(
    descriptor: int, seconds: float, *, shared: bool = False, on_wait: Callable[[], None] = lambda: None
) -> bool:
    """Lock an open file, or go on where there are no locks; False after ``seconds``.

    Args:
        on_wait: called once, when the wait is long enough to be told of.
    """
    started, told = time.monotonic(), False
    while try_lock(descriptor, shared=shared) is False:
        waited = time.monotonic() - started
        if waited >= seconds:
            return False
        if waited >= QUIET_S and not told:
            on_wait()
            told = True
        time.sleep(POLL_S)
    return True


def open_lock(path: Path, *, create: bool = True) -> int:
    """Open a lock's file, and make it where there is none: never through a link, and never a pipe or a device.

    Raises:
        OSError: something else is there.
    """
    descriptor = os.open(path, OPENING | (os.O_CREAT if create else 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


@contextlib.contextmanager
def guarding(output: Path, seconds: float = PATIENCE_S) -> Iterator[bool]:
    """Hold the lock of an output, a hidden file beside it that goes at the end; yields whether it is held.

    Raises:
        MachineError: another process does not let go of it.
        OSError: the folder cannot be written.
    """
    lock = output.with_name(f".{output.name}.lock")
    try:
        descriptor = _locked(lock, seconds)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        descriptor = None  # somebody put something else there
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        # First the name, then the lock: who waits for this file looks whether it is still the one of that name.
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _locked(lock: Path, seconds: float) -> int | None:
    """A descriptor that holds the lock; None where there are no locks."""
    deadline = time.monotonic() + seconds
    while True:
        descriptor = open_lock(lock)
        try:
            if not wait_for_lock(descriptor, deadline - time.monotonic()):
                raise MachineError(
                    f"another process has held {lock} for {seconds:g} s",
                    hint="end that process, which may be stopped, or choose another output with -o",
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
                    if try_lock(descriptor) is None:
                        lock.unlink(missing_ok=True)
                        os.close(descriptor)
                        return None
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile
