"""How large a request or a manifest may be.

Far above what any system needs, and low enough that a number which is absurd is a message before anything is allocated.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from dexport.errors import UsageError

MOST_STEPS = 10_000
"""Of a sampler."""
MOST_STEPS_SERVED = 1000
"""In a request to a server."""
LARGEST_SEED = 2**63 - 1
LARGEST_LABEL = 2**63 - 1
"""Labels are int64."""
MOST_CLASSES = 10_000_000
MOST_PICTURES = 1_000_000
"""Of one run, all classes together; FID takes 50,000."""
MOST_CALIBRATION_IMAGES = 100_000
MOST_BATCH = 65_536
MOST_WORKSPACE_MIB = 2**24
MOST_THREADS = 4096
MOST_ROUNDS = 100_000
LARGEST_SIDE = 65_536
"""Of an image, in pixels, and of a state, in cells."""
LARGEST_GRID = 2**24
"""Cells of a state: 4096x4096."""
LARGEST_STATE = 2**28
"""Numbers of one state: 1 GiB."""
MOST_CHANNELS = 65_536
MOST_DIMENSIONS = 8
LARGEST_SCALE = 10_000.0
"""Of guidance."""
LARGEST_POWER = 100.0
"""Of time, in a guidance that grows with it."""
LARGEST_SHUFFLE = 1024
"""Factor and tiles of a pixel shuffle."""
LARGEST_LATENT_SCALE = 1e6
MOST_MODULES = 8_000
"""Of a network."""
LARGEST_TABLE = 2**28
"""Numbers of a table that a network's constructor computes, such as positions: they are real memory."""
LARGEST_SETTING = 2.0**53
"""Of a constructor argument."""
DEEPEST_SETTING = 16
LARGEST_CACHE_GB = 1e9
LONG_BITS = 128
"""Larger numbers are not spelled out."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > LONG_BITS:
        return f"a number of {value.bit_length():,} bits"
    return _short.repr(value)


def check_whole(name: str, value: int, most: int, least: int = 0) -> int:
    """A whole number within a limit.

    Args:
        name: what it is, for the message, such as an option.

    Raises:
        UsageError: it is another, or none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
        raise UsageError(f"{name} {shown(value)} is out of range", hint=f"give {least:,} to {most:,}")
    return int(value)


def check_pictures(labels: int, count: int) -> None:
    """Refuse a run that makes nothing, or more pictures than any evaluation takes.

    Raises:
        UsageError: a count below 1, or too many.
    """
    if count < 1:
        raise UsageError(f"--count {shown(count)} starts at 1", hint="give 1 or more")
    if labels * count > MOST_PICTURES:
        raise UsageError(
            f"--count {shown(count)} for each of {labels:,} classes is more than {MOST_PICTURES:,} pictures",
            hint="give a smaller --count, or fewer --classes",
        )


def check_setting(value: Any, depth: int = 0) -> None:
    """A constructor argument: JSON values that are neither absurdly large nor deep.

    Raises:
        ValueError: with the reason.
    """
    if depth > DEEPEST_SETTING:
        raise ValueError(f"a value is nested more than {DEEPEST_SETTING} deep")
    if isinstance(value, (int, float)) and not (math.isfinite(value) if isinstance(value, float) else True):
        raise ValueError(f"{value} is no number that can be used")
    if isinstance(value, (int, float)) and abs(value) > LARGEST_SETTING:
        raise ValueError(f"{shown(value)} is too large")
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    for each in inner:
        check_setting(each, depth + 1)


def check_table(*sizes: int) -> None:
    """Refuse a table before its memory is taken.

    Raises:
        ValueError: it would be larger than any network needs.
    """
    if math.prod(max(0, size) for size in sizes) > LARGEST_TABLE:
        raise ValueError(f"a table of {' x '.join(map(shown, sizes))} numbers is larger than {LARGEST_TABLE:,}")
