"""Errors that reach the user, each with the exit code of DESIGN section 5.

A message names the thing, what was expected, and the next command to run. What is none of them is a defect of dexport.
"""

from __future__ import annotations

import os
from pathlib import Path

from dexport.printable import printable_lines

DEFECT = 70
"""Exit code of what nobody foresaw: EX_SOFTWARE of sysexits.h. It is never that of a failed gate."""


class DexportError(Exception):
    """Base of all errors that are reported without a traceback.

    Attributes:
        exit_code: process exit code: 1 a gate failed, 2 usage, 3 environment, 4 bad input.
        hint: the fix, printed on its own line; empty when the message already says it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        # Names in damaged and hostile files hold what a terminal would obey.
        super().__init__(printable_lines(message))
        self.hint = printable_lines(hint)


class BundleWarning(UserWarning):
    """What a bundle is not: trained, verified, within its gates, or fit to ship. From the Python functions."""


class GateError(DexportError):
    """A parity or benchmark gate failed."""

    exit_code = 1


class UsageError(DexportError):
    """The request itself is wrong: unknown recipe, bad option value, existing output."""

    exit_code = 2


class MachineError(DexportError):
    """This machine cannot do it: no GPU, missing extra, full or unwritable disk, dead builder."""

    exit_code = 3


class InputError(DexportError):
    """A file that was given is bad: checkpoint, ONNX model, bundle."""

    exit_code = 4


def free_name(path: Path) -> Path:
    """The path, or else ``NAME-2``, ``NAME-3``, ...: a place that a fix may name, because nothing is there."""
    first, name = path.name[:1], path.name[1:]
    stem, dot, rest = name.partition(".")
    number, found = 2, path
    while os.path.lexists(found):
        found = path.with_name(f"{first}{stem}-{number}{dot}{rest}")
        number += 1
    return found
