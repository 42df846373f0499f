"""Pictures that others made, from disk: PNG, JPEG and WebP files, bounded before they are decoded.

What a pixel is, is decided here once. Grey and RGB of 8 bits per channel are taken as they are, palettes and one-bit
pictures as the colours that they stand for, and an alpha channel is left out where it is opaque everywhere. What would
need a decision (transparency, CMYK, 16 bits, several frames) is refused by name. EXIF orientation is not applied, as
no tool that measures FID applies it; who shows numbers can say how many pictures have one.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dexport.errors import DexportError, InputError
from dexport.places import open_input
from dexport.printable import printable

FORMATS = ("PNG", "JPEG", "WEBP")
"""The only decoders that are asked. Pillow has others, and the one of PostScript starts Ghostscript."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_PIXELS = 1 << 26
"""Of one picture, 8192x8192: a file of a few hundred KB may claim more than a machine has memory for."""
LARGEST_FILE = 1 << 28
CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3}
"""Of what the modes of Pillow become. A palette may hold colours, so it counts as such."""
NOT_PICTURES = ("__macosx", "thumbs", "@eadir")
"""Folders of thumbnails and copies that archivers and file managers put beside pictures."""
BIT_DEPTH_AT, DEEP = 24, 16
ORIENTATION, UPRIGHT = 274, 1
NAMED = 5
"""Files that a report names of each kind that was skipped."""


@dataclass(frozen=True)
class Skipped:
    """Entries of a folder that are no pictures of the set.

    Attributes:
        why: what they are.
        count: how many.
        names: the first few, relative to the folder; a folder ends in a slash.
    """

    why: str
    count: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        """Printable, for people."""
        more = ", ..." if self.count > len(self.names) else ""
        return f"{self.count} {self.why} ({', '.join(map(printable, self.names))}{more})"


@dataclass(frozen=True)
class Found:
    """The pictures in a folder and below it, in the order of their paths, and what else there is."""

    files: tuple[Path, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Header:
    """What a picture's file says before it is decoded: (H, W, C), and whether a viewer would turn it."""

    shape: tuple[int, int, int]
    turned: bool


def find_images(folder: Path) -> Found:
    """The PNG, JPEG and WebP files of a folder and all below it, by suffix in any case.

    Hidden files and folders and those of file managers are left out. Links are followed; a folder that several names
    lead to counts once, under its own name where it has one here. Special files are never opened.

    Raises:
        InputError: a folder that cannot be listed.
    """
    files: list[Path] = []
    skipped: dict[str, list[str]] = {}
    seen = {_identity(parent.stat()) for parent in folder.resolve().parents}  # a link up there is a loop
    waiting: list[Path] = [folder]
    linked: list[Path] = []  # come last, after all folders that are really here

    def skip(entry: Path, why: str, end: str = "") -> None:
        skipped.setdefault(why, []).append(entry.relative_to(folder).as_posix() + end)

    while waiting or linked:
        current = waiting.pop() if waiting else linked.pop(0)
        try:
            identity = _identity(current.stat())
            if identity in seen and current != folder:
                skip(current, "links to folders that were read already", "/")
                continue
            seen.add(identity)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"{printable(current)} cannot be listed: {error.strerror}", hint="check its permissions"
            ) from error
        for entry in entries:
            path, mode = Path(entry.path), _mode(entry.path)
            is_folder = stat.S_ISDIR(mode)
            end = "/" if is_folder else ""
            if entry.name.startswith("."):
                skip(path, "hidden", end)
            elif is_folder and entry.name.lower() in NOT_PICTURES:
                skip(path, "of a file manager", end)
            elif is_folder:
                (linked if entry.is_symlink() else waiting).append(path)
            elif not mode:
                skip(path, "links to nothing")
            elif not stat.S_ISREG(mode):
                skip(path, "no regular files")
            elif path.suffix.lower() in SUFFIXES:
                files.append(path)
            else:
                skip(path, "no PNG, JPEG or WebP files")
    return Found(
        tuple(sorted(files)),
        tuple(Skipped(why, len(names), tuple(sorted(names)[:NAMED])) for why, names in sorted(skipped.items())),
    )


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _mode(path: str) -> int:
    """What a name leads to; 0 for nothing."""
    try:
        return Path(path).stat().st_mode
    except OSError:
        return 0


def read_header(path: Path) -> Header:
    """What a picture will be, without decoding it.

    Raises:
        InputError: no PNG, JPEG or WebP file, too large a one, or one whose pixels would need a decision.
    """
    with _opened(path) as (_, image):
        height, width = image.height, image.width
        return Header((height, width, CHANNELS[image.mode]), _is_turned(image))


def read_image(path: Path) -> np.ndarray:
    """Pixels (H, W, 1 or 3) uint8 of a picture that is whole.

    Raises:
        InputError: as :func:`read_header`, or the file is cut short or damaged, or pixels are transparent.
    """
    with _opened(path) as (file, image):
        _verify(file, image)
        with Image.open(file, formats=FORMATS) as whole:
            whole.load()
            array = np.asarray(_flattened(path, whole))
    return array[..., None] if array.ndim == 2 else array


def text_of_png(path: Path, keyword: str) -> str | None:
    """What a whole PNG file says under a keyword; None where it says nothing, or the file is something else."""
    try:
        with _opened(path) as (file, image):
            _verify(file, image)
            text = image.info.get(keyword)
    except InputError:
        return None
    return text if isinstance(text, str) else None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """The file and its header, which has been checked; nothing is decoded yet."""
    shown = printable(path)
    with open_input(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, and of sizes that are judged here
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise InputError(f"{shown} has {size:,} bytes; a picture has {LARGEST_FILE:,} at most", hint="remove it")
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check(shown, file, image)
                yield file, image
        except DexportError:
            raise
        except Image.DecompressionBombError as error:
            raise InputError(f"{shown}: {error}", hint="remove it, or make it smaller") from error
        except Exception as error:
            # Of damaged files, decoders raise anything at all.
            raise InputError(
                f"{shown} is not a whole PNG, JPEG or WebP file: {printable(str(error) or type(error).__name__)}",
                hint="remove it or make it again",
            ) from error


def _check(shown: str, file: BinaryIO, image: Image.Image) -> None:
    if image.width * image.height > LARGEST_PIXELS or 0 in image.size:
        raise InputError(
            f"{shown} has {image.width}x{image.height} pixels; 1 to {LARGEST_PIXELS:,} are read",
            hint="remove it, or make it smaller",
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG file with a preview or a depth map behind its picture
        raise InputError(f"{shown} holds {frames} frames, not one picture", hint="store its frames one by one")
    if image.mode not in CHANNELS:
        raise InputError(
            f"{shown} is {image.mode}, not 8-bit grey or RGB", hint="flatten transparency and convert it first"
        )
    if image.format == "PNG" and _bit_depth(file) == DEEP:
        raise InputError(f"{shown} has 16 bits per channel, not 8", hint="convert it to 8 bits first")


def _bit_depth(file: BinaryIO) -> int:
    """Of a PNG file. Pillow halves the 16 bits of a colour without a word."""
    position = file.tell()
    file.seek(BIT_DEPTH_AT)
    depth = file.read(1)[0]
    file.seek(position)
    return depth


def _verify(file: BinaryIO, image: Image.Image) -> None:
    """Check a PNG's checksums, which its decoder does not look at. The image is of no use afterwards, the file is."""
    if image.format == "PNG":
        fresh = Image.open(file, formats=FORMATS)
        fresh.verify()
    file.seek(0)


def _flattened(path: Path, image: Image.Image) -> Image.Image:
    """Without palette, and without an alpha channel that is opaque."""
    grey = CHANNELS[image.mode] == 1
    if not image.has_transparency_data:
        return image if image.mode in ("L", "RGB") else image.convert("L" if grey else "RGB")
    whole = image.convert("LA" if grey else "RGBA")
    lowest, _ = whole.getchannel("A").getextrema()
    if lowest != 255:
        raise InputError(
            f"{printable(path)} is {image.mode} with transparent pixels, not 8-bit grey or RGB",
            hint="flatten transparency and convert it first",
        )
    return whole.convert("L" if grey else "RGB")


def _is_turned(image: Image.Image) -> bool:
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(ORIENTATION, UPRIGHT)
    except (SyntaxError, ValueError, TypeError, LookupError, EOFError, OSError, struct.error):
        return False  # metadata that cannot be read turns nothing
    return orientation in range(UPRIGHT + 1, 9)
