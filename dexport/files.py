"""Files and folders that others see whole or not at all, and files of others that are opened without surprises.

There is one way to write: a temporary file of a drawn name beside the target, opened so that it follows no link and
takes nothing that is there, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dexport.errors import MachineError, UsageError
from dexport.locks import try_lock

PARTIAL = ".partial-"
DRAFT_NAME = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{8}", re.DOTALL)
"""What is in the making is called ``.NAME.partial-RANDOM``, beside the place that it will take."""
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EBUSY,
    errno.EXDEV,
    errno.EIO,
    errno.ENOTEMPTY,
)
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
NEW |= getattr(os, "O_BINARY", 0)
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
AT_FDCWD, NO_REPLACE, EXCHANGE = -100, 1, 2
"""Of Linux's renameat2."""


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a MachineError that names the folder (of a draft: its parent)."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise MachineError(
            f"{outside_drafts(folder)} cannot be written: {os.strerror(error.errno or 0)}",
            hint="free some space or choose another output with -o",
        ) from error


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A new file, for writing bytes, that takes the place of ``path`` at the end; an error leaves what was there.

    Args:
        overwrite: without, a file that was made at ``path`` meanwhile stays.

    Raises:
        UsageError: something else than a file is there, or anything, and it may not be overwritten.
        MachineError: it cannot be written.
    """
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_file(path)
        descriptor, draft = create_draft(path)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if overwrite:
                    draft.replace(path)
                else:
                    move_new(draft, path)
        except FileExistsError as error:
            raise UsageError(f"{path} exists already", hint="choose another output with -o") from error
        finally:
            draft.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file, and its folder where there is none; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_file(path: Path) -> None:
    """Refuse to take the place of a folder, a pipe or a device, also behind a link.

    Raises:
        UsageError: one is there.
    """
    with contextlib.suppress(OSError):  # who opens it will say what is wrong
        if not path.name or not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} is no regular file", hint="name another file")


def create_draft(path: Path) -> tuple[int, Path]:
    """A new file of a drawn name beside ``path``; its lock is held until the descriptor is closed."""
    while True:
        draft = draft_of(path)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(draft, NEW, 0o666)
            if try_lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
                return descriptor, draft
            os.close(descriptor)  # taken for a remain before the lock was there


def draft_of(path: Path) -> Path:
    """A drawn name for what will take the place of ``path``."""
    return path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")


def outside_drafts(path: Path) -> Path:
    """A path, or the folder that holds the draft which it lies in: drafts are not there for long."""
    return next((each.parent for each in reversed((path, *path.parents)) if DRAFT_NAME.fullmatch(each.name)), path)


def open_regular(path: str | Path, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading. A pipe or a device is refused and never waited for.

    Args:
        follow: whether a link may stand for the file.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, READ | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code, text = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "Not a regular file")
        raise OSError(code, text, str(path))
    return os.fdopen(descriptor, "rb")


def move_new(source: Path, target: Path) -> None:
    """Rename a file or a folder to a name that nothing has at that moment.

    Raises:
        FileExistsError: something has it.
    """
    if _rename_with(NO_REPLACE, source, target):
        return
    # A file system without that: a claim that only one can make, which the rename then replaces.
    is_folder = source.is_dir()
    if is_folder:
        target.mkdir()
    else:
        os.close(os.open(target, NEW, 0o666))
    try:
        source.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir() if is_folder else target.unlink()
        raise


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system cannot."""
    return _rename_with(EXCHANGE, one, other)


def amount(size: int) -> str:
    """Bytes for people: ``1.5 GB``, ``3.2 MB``, ``812 bytes``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def remove_tree(folder: Path) -> None:
    """Remove a folder as far as possible."""
    shutil.rmtree(folder, ignore_errors=True)


def _rename_with(flag: int, source: Path, target: Path) -> bool:
    function = _renameat2()
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
