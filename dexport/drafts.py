"""Folders in the making: temporary siblings of their outputs, which take their places in one step or vanish.

A draft holds the lock of a file in it for as long as its process lives. So remains are known from what is alive, in
containers too, and the next draft of the same output removes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from dexport.errors import MachineError, UsageError
from dexport.files import (
    DRAFT_NAME,
    PARTIAL,
    amount,
    draft_of,
    exchange,
    move_new,
    outside_drafts,
    remove_tree,
    writing_to,
)
from dexport.locks import guarding, open_lock, try_lock

ALIVE = ".alive"
"""The locked file in a draft."""
REPLACED = "-replaced"
"""How the name of a folder ends that was moved away for another, where the system cannot exchange two."""
MOUNTS = Path("/proc/self/mountinfo")
Replaceable = Callable[[Path], bool]


class LiveFolder:
    """A new folder beside ``place``, for this user only, that tells other processes that its own one lives.

    It goes with the object, and at the end of the process, unless its path has become another folder's.
    """

    def __init__(self, place: Path) -> None:
        while True:
            self.path = draft_of(place)
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                self.path.mkdir(0o700)
                try:
                    descriptor = open_lock(self.path / ALIVE)
                except FileNotFoundError:
                    continue  # taken for a remain before the lock was there
                except BaseException:
                    remove_tree(self.path)
                    raise
                self._end = weakref.finalize(self, _end_draft, self.path, descriptor, os.getpid())
                if try_lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
                    self._descriptor = descriptor
                    return
                self._end()
            if not place.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place.parent))

    def hide_lock(self) -> None:
        """Remove the lock's file, which is held on."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / ALIVE).unlink()

    def discard(self) -> None:
        """Remove the folder with all that is in it now."""
        self._end()

    def release(self) -> None:
        """The folder has another name now."""
        if self._end.detach():
            os.close(self._descriptor)


class FolderDraft:
    """A folder in the making, which takes the place of ``output`` when it is published.

    Args:
        force: replace what is at the output, where ``replaceable`` says that this folder may be.
        bytes_needed: on the disk.

    Use it as a context manager: an exception removes the draft and leaves what was at the output as it was.

    Attributes:
        SEAL: the file, at the top, that makes the folder what it is.
        output: where it will be.
        path: where it is.

    Raises:
        UsageError: the output exists and ``force`` is not given, may not be replaced, or cannot be.
        MachineError: the output's parent cannot be written, or has too little space.
    """

    SEAL = ""

    def __init__(self, output: str | Path, replaceable: Replaceable, *, force: bool, bytes_needed: int = 0) -> None:
        self.output = output_folder(output)
        self._force, self._replaceable = force, replaceable
        parent = self.output.parent
        with writing_to(parent):
            self._check()
            parent.mkdir(parents=True, exist_ok=True)
            with guarding(self.output) as held:
                if held:
                    clear_remains(parent, self.output.name, replaceable)
                self._check()
            self._live = LiveFolder(self.output)
            self.path = self._live.path
            self.path.chmod(0o755)
            free = shutil.disk_usage(self.path).free
        if free < bytes_needed:
            self.discard()
            raise MachineError(
                f"{outside_drafts(parent)} has {amount(free)} free; this build writes about {amount(bytes_needed)}",
                hint="free some space or choose another output with -o",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write_text(self, relative: str, text: str) -> None:
        """Write a small file inside the draft."""
        with writing_to(self.path):
            target = self.path / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")

    def publish(self) -> None:
        """Move the draft to its place as it is.

        What stands there is looked at again at that moment: nothing is replaced without ``force``, and with it only
        what may be.

        Raises:
            UsageError: something was put there meanwhile.
        """
        with writing_to(self.output.parent), guarding(self.output):
            self._live.hide_lock()
            try:
                move_new(self.path, self.output)
                self._live.release()
            except FileExistsError:
                self._check()
                self._replace()

    def discard(self) -> None:
        """Remove the draft, if it has not been published."""
        self._live.discard()

    def _check(self) -> None:
        check_output(self.output, self._replaceable, force=self._force)

    def _replace(self) -> None:
        if not self._force:  # it was gone again when it was looked at
            raise UsageError(f"{self.output} was made meanwhile", hint="choose another output with -o")
        try:
            if not exchange(self.path, self.output):
                self._replace_in_two_steps()
            elif not _may_go(self.path, self._replaceable):
                exchange(self.path, self.output)
                self._check()
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _refill(self.output, self.path, self.SEAL)
        self._live.discard()

    def _replace_in_two_steps(self) -> None:
        replaced = self.path.with_name(self.path.name + REPLACED)
        self.output.rename(replaced)
        try:
            if not _may_go(replaced, self._replaceable):
                raise UsageError(f"{self.output} was changed meanwhile", hint="choose another -o")
            move_new(self.path, self.output)
        except BaseException:
            move_new(replaced, self.output)
            raise
        remove_tree(replaced)


def output_folder(output: str | Path) -> Path:
    """The absolute path of a folder that can be made, or replaced; of a link, what it points to.

    Raises:
        UsageError: the root, the working directory or a folder around it, or a mount point.
    """
    try:
        working = Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the working directory is gone", hint="change to another") from error
    path = Path(output).absolute()
    real = Path(os.path.realpath(path))
    # What a link points to is replaced, never the link.
    if os.path.islink(path) or path.name in ("", ".."):  # noqa: PTH114 - of names that are too long, too
        path = real
    if real == working or real in working.parents or not path.name:
        reason = "is the working directory" if real == working else "is a folder around the working directory"
        raise UsageError(f"{path} {reason}, which cannot be replaced", hint="name a folder in it: -o NAME")
    if is_mount_point(path):
        raise UsageError(
            f"{path} is a mount point, which cannot be replaced", hint=f"name a folder in it: -o {path}/NAME"
        )
    return path


def check_output(output: Path, replaceable: Replaceable, *, force: bool) -> None:
    """Refuse what stands in the way of an output.

    Raises:
        UsageError: something is there, and ``force`` is not given or it may not be replaced.
    """
    if not os.path.lexists(output):
        return
    if not force:
        raise UsageError(f"{output} exists already", hint="choose another output with -o, or replace it with --force")
    if not _may_go(output, replaceable):
        raise UsageError(
            f"{output} exists and is not a dexport bundle, so --force does not replace it", hint="choose another -o"
        )


def clear_remains(folder: Path, name: str | None = None, replaceable: Replaceable = lambda _: False) -> None:
    """Remove the drafts of processes that are gone, and give back what they had moved away.

    Args:
        name: of the output; None for drafts of every output in ``folder``.
        replaceable: whether a draft that lacks its lock is one that was being published.
    """
    for entry in _entries(folder):
        draft = entry.with_name(entry.name.removesuffix(REPLACED))
        found = DRAFT_NAME.fullmatch(draft.name)
        if found is None or name not in (None, found["name"]):
            continue
        with contextlib.suppress(OSError):
            if entry.name.endswith(REPLACED):
                _give_back(entry, folder / found["name"], replaceable)
            elif stat.S_ISDIR(entry.lstat().st_mode):
                _remove_if_dead(entry, replaceable)
            elif stat.S_ISREG(entry.lstat().st_mode):
                _with_lock(entry, entry.unlink)


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted there; of Linux, also a folder of the same file system."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    places = {line.split(" ")[4] for line in lines}
    spelled = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in os.path.realpath(path))
    return spelled in places or os.path.ismount(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if PARTIAL in entry.name]
    except OSError:
        return []


def _may_go(folder: Path, replaceable: Replaceable) -> bool:
    return folder.is_dir() and not folder.is_symlink() and (not any(folder.iterdir()) or replaceable(folder))


def _give_back(moved: Path, output: Path, replaceable: Replaceable) -> None:
    if not replaceable(moved):
        return
    try:
        move_new(moved, output)
    except FileExistsError:
        remove_tree(moved)


def _remove_if_dead(draft: Path, replaceable: Replaceable) -> None:
    try:
        _with_lock(draft / ALIVE, lambda: remove_tree(draft))
    except FileNotFoundError:
        # Killed between its first or its last two steps.
        if _may_go(draft, replaceable):
            remove_tree(draft)


def _with_lock(file: Path, action: Callable[[], object]) -> None:
    """Do it if nobody alive holds the lock of a file that exists."""
    descriptor = open_lock(file, create=False)
    try:
        if try_lock(descriptor):
            action()
    finally:
        os.close(descriptor)


def _refill(output: Path, draft: Path, seal: str) -> None:
    """Replace what is in a folder that cannot be moved, such as one of a container's image, file by file.

    The seal comes last. Until then the old one is there, which what is new does not fit.
    """
    files = {path.relative_to(draft) for path in draft.rglob("*") if not path.is_dir()}
    folders = {folder for name in files for folder in name.parents}
    for old in sorted(output.rglob("*"), reverse=True):
        name = old.relative_to(output)
        if old.is_dir() and not old.is_symlink():
            if name not in folders:
                old.rmdir()
        elif name not in files:
            old.unlink()
    for name in sorted(files, key=lambda name: (name == Path(seal), name)):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).replace(output / name)


def _end_draft(path: Path, descriptor: int, process: int) -> None:
    """Of the process that made it only, not of one that it forked."""
    if os.getpid() == process:
        remove_tree(path)
    os.close(descriptor)
