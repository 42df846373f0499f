"""Random changes of good content, of which the same seed gives the same: bytes, JSON values, members of zip files."""

from __future__ import annotations

import copy
import io
import random
import struct
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

Rng = random.Random
NUMBERS = (0, 1, -1, 2, 127, 128, 255, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 70, 0.5, -0.0, float("nan"))
TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "/x",
    "a/b",
    "\x00",
    "\ud800",
    "\x1b[2J",
    "[red]",
    "[/x]",
    "é",
    "B",
    "x" * 300,
    "manifest.json",
)


def damaged(rng: Rng, content: bytes) -> bytes:
    """A few changes of bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 512))
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                number = int(rng.choice(NUMBERS[:11])) & 0xFFFFFFFFFFFFFFFF
                data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", number)
            case 5:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + length]
            case 6:
                del data[at:]
    return bytes(data)


def changed(rng: Rng, value: Any) -> Any:
    """A JSON value in which a few fields have another value, are missing, are new, or have moved."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder[key], dict):
                holder[key][rng.choice(TEXTS)] = _anything(rng)
            case 2 if isinstance(holder[key], list):
                holder[key].append(_anything(rng))
            case 3:
                other, at = rng.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case _:
                holder[key] = _anything(rng)
    return root[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _anything(rng: Rng) -> Any:
    return copy.deepcopy(
        rng.choice((None, True, False, [], {}, [[]], {"a": 1}, rng.choice(NUMBERS), rng.choice(TEXTS)))
    )


def rezipped(rng: Rng, good: bytes, also: tuple[str, ...] = ()) -> bytes:
    """A whole zip file in which one member is damaged, missing, there twice, compressed, or of another name.

    Args:
        also: names that are drawn more often.
    """
    source, file = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
    names = source.namelist()
    target = rng.choice(names + [name for name in names if name.endswith(also)] * 3 if also else names)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as made:
        warnings.simplefilter("ignore")  # names that are there twice
        for name in names:
            content = source.read(name)
            if name != target:
                made.writestr(name, content)
                continue
            match rng.randrange(8):
                case 0:
                    made.writestr(name, content, zipfile.ZIP_DEFLATED)
                case 1:
                    made.writestr(name, content)
                    made.writestr(rng.choice((name, name.upper(), f"x/{name}")), damaged(rng, content))
                case 2:
                    made.writestr(rng.choice((*names, "x/byteorder", name + "/", "../" + name)), content)
                case 3:
                    pass
                case _:
                    made.writestr(name, damaged(rng, content))
        if rng.random() < 0.1:
            made.writestr(f"{names[0].partition('/')[0]}/byteorder", rng.choice((b"big", b"little", b"", b"middle")))
    data = bytearray(file.getvalue())
    if rng.random() < 0.2:  # in the directory: offsets, sizes, methods
        at = data.rfind(b"PK\x01\x02") + rng.randrange(46)
        data[at : at + 4] = struct.pack("<I", int(rng.choice(NUMBERS[:11])) & 0xFFFFFFFF)
    return bytes(data)
