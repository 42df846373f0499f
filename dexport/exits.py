"""How a command ends: with one message and an exit code, and with nothing left behind.

An interruption is an exception like any other, so that what holds drafts, temporary files and child processes lets go
of them: Ctrl-C ends with 130, SIGTERM with 143, SIGHUP with 129, and a reader that went away (``| head``) with 141.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click

from dexport.drafts import LiveFolder, clear_remains
from dexport.errors import DEFECT, DexportError, InputError, MachineError

BUILDING = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "msgspec",
    "psutil",
    "ml_dtypes",
)
"""Packages that building needs and sampling does not: an environment may lack them."""
OF_A_SIGNAL = 128
BROKEN_PIPE = OF_A_SIGNAL + 13
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
OF_THIS_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EACCES,
    errno.EPERM,
)
"""Errors of the system that are nobody's fault but the disk's, the memory's or the rights'."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate", "bad_alloc")
"""What torch and ONNX Runtime say."""
LONGEST = 200
CLEANING_S = 5.0
TEMPORARY = "TMPDIR"
COMPILED = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch makes a folder when it is imported."""


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Around a command: output that takes every letter, signals as exceptions, a temporary folder of its own."""
    prepare_output()
    with stoppable() as stopped:
        try:
            with own_temporary_folder():
                yield
        except (KeyboardInterrupt, Interrupted) as error:  # between two commands, so to speak
            sys.exit(report(error))
        except SystemExit as end:
            if stopped:  # whatever was made of it on the way
                end.code = OF_A_SIGNAL + stopped[-1]
            _flush(end)
            raise


def report(error: BaseException) -> int:
    """Print what went wrong, and what mends it; returns the exit code."""
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        _say(f"stopped by {signal.Signals(number).name}")
        return OF_A_SIGNAL + number
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return BROKEN_PIPE
    known = expected(error)
    if known is None:
        _say(f"error: this is a defect of dexport ({_in_short(error)}): {_kept(error)}", fg="red")
        return DEFECT
    _say(f"error: {known}", fg="red")
    if known.hint:
        _say(f"fix: {known.hint}")
    return known.exit_code


def expected(error: BaseException) -> DexportError | None:
    """The error of this package that an exception amounts to; None for a defect."""
    if isinstance(error, DexportError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name in BUILDING:
        return MachineError(
            f"this needs {error.name}, which is not installed",
            hint="pip install dexport; `sample` and `info` of a bundle do without",
        )
    if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        return MachineError(
            f"{place}{os.strerror(error.errno or 0)}", hint="free some space, or look at its rights and limits"
        )
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in OUT_OF_MEMORY)):
        return MachineError(
            f"this machine has too little memory: {_in_short(error)}",
            hint="free some, take smaller batches, or use a larger machine",
        )
    if isinstance(error, RecursionError):
        return InputError("what was given is nested too deeply", hint="give something flatter")
    return None


def prepare_output() -> None:
    """Letters that a terminal lacks are escaped rather than an error; a stream that was closed takes what comes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - to the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """Signals that ask for the end raise :class:`Interrupted`; yields those that did.

    For a while after one, no other does: what is being cleaned up is not interrupted.
    """
    stopped: list[int] = []
    quiet_until = -math.inf

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal quiet_until
        if time.monotonic() >= quiet_until:
            quiet_until = time.monotonic() + CLEANING_S
            stopped.append(number)
            raise Interrupted(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        # What was ignored stays so, as under nohup.
        before = {each: handler for each in STOPPING if (handler := signal.getsignal(each)) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield stopped
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """A temporary folder that goes with the command: libraries leave things in it, as torch and ONNX Runtime do."""
    try:
        place = Path(tempfile.gettempdir()) / "dexport"
        clear_remains(place.parent, place.name)
        live = LiveFolder(place)
    except OSError:  # nothing can be written; who needs it will say so
        yield
        return
    kept = {name: os.environ.get(name) for name in (TEMPORARY, COMPILED)}
    before = tempfile.tempdir
    os.environ[TEMPORARY] = tempfile.tempdir = str(live.path)
    os.environ.setdefault(COMPILED, str(live.path / "inductor"))
    try:
        yield
    finally:
        tempfile.tempdir = before
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        live.discard()


def _kept(error: BaseException) -> str:
    """Where the traceback is; where nothing can be written, the traceback itself."""
    lines = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        number, name = tempfile.mkstemp(prefix="dexport-", suffix=".traceback", dir=_shared_temporary_folder())
        try:
            with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(lines)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        return f"please report it with {name}"
    return f"please report it with this traceback\n{lines}"


def _shared_temporary_folder() -> Path:
    """The folder around that of the command."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.name.startswith(".dexport.") else folder


def _in_short(error: BaseException) -> str:
    """Its class, and the first line of what it says."""
    first = next(iter(str(error).strip().splitlines()), "")
    shown = first if first.isprintable() else ascii(first)
    text = f"{type(error).__name__}: {shown}" if shown else type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _say(text: str, fg: str | None = None) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        click.secho(text, fg=fg, err=True)


def _flush(end: SystemExit) -> None:
    """Write out now, while it can still be told that this did not work."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = report(error)
        _drop_output()
        end.code = code


def _drop_output() -> None:
    """Let the interpreter find nothing to complain of at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
