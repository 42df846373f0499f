"""Where inputs are and results go, looked at before any work; and folders that one process fills at a time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dexport.bundle import refuse_inside_bundle
from dexport.errors import InputError, UsageError
from dexport.files import check_file, draft_of, open_regular, writing_to
from dexport.locks import try_lock
from dexport.printable import printable

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_input(path: Path) -> BinaryIO:
    """Open a file that was given; whatever else there is under its name is refused without being opened.

    Opening a FIFO waits for its writer, and opening a device may do anything.

    Raises:
        InputError: no such file, another kind of file, or one that cannot be read.
    """
    shown = printable(path)
    try:
        mode = path.stat().st_mode
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), None)
        if kind is not None:
            raise InputError(f"{shown} is {kind}, not a regular file", hint="give a regular file")
        return open_regular(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be read: {_reason(error)}", hint="check its name and permissions") from error


def check_place(output: Path) -> None:
    """Refuse a place where no file can be written, before the work whose result would go there.

    Raises:
        UsageError: it is a folder or a special file, lies in a bundle, below a file, or where nobody may write.
    """
    shown = printable(output)
    try:
        refuse_inside_bundle(output)
        check_file(output)
        folder = next(parent for parent in output.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise UsageError(f"{shown}: {printable(folder)} is no folder", hint="choose another output")
        draft_of(output).exists()  # whose name is longer
    except (OSError, ValueError) as error:
        raise UsageError(f"{shown} cannot be written: {_reason(error)}", hint="choose another output") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{shown} cannot be written: {folder} is not writable", hint="choose another output")


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and keep other processes from filling it meanwhile.

    The lock is of the open folder: it ends with the process, however that ends.

    Raises:
        UsageError: another process fills it.
        MachineError: it cannot be made.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None
    if descriptor is None:  # Windows opens no folders
        yield
        return
    try:
        if try_lock(descriptor) is False:
            raise UsageError(
                f"{folder} is being filled by another run of dexport",
                hint="wait until it has ended, or choose another output with -o",
            )
        yield
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or printable(error)
