"""A folder of pictures that an interrupted run can go on filling, and the grid that shows them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dexport.bundle import refuse_inside_bundle
from dexport.drafts import clear_remains
from dexport.errors import InputError, UsageError
from dexport.files import replacing, write_whole, writing_to
from dexport.image_files import read_image, text_of_png
from dexport.places import filling, open_input

SETTINGS = "run.json"
LABELS = "labels"
LARGEST_RECORD = 1 << 26
PICTURE = re.compile(r"([0-9]{5,})\.png")
KEYWORD = "dexport"
"""Of the text in a picture that says which run made it, and its number there."""
FOREIGN = ".foreign"
MARGIN = 4
SMALLEST_TEXT = 11
SMALLEST_CELL = 64
"""Smaller pictures are enlarged in the grid by a whole factor, so that a caption fits."""


class Gallery:
    """Numbered pictures in a folder, with the settings that made them.

    Each picture says in a text of its own which run made it. So one that was cut short, exchanged or copied is made
    again, and nothing that another one put there is taken for a picture of this run, or deleted.

    Args:
        folder: is made when it does not exist.
        settings: JSON values that fix every picture; its ``labels`` are one per picture. A folder that was made with
            others is refused. A record that cannot be read says nothing, and is written anew.
        captions: one per picture.
        force: start anew where the settings differ. The pictures that the record lists are removed, nothing else.

    Attributes:
        set_aside: what lay where pictures of this run go and is none that a record lists: its new names in the folder.

    Raises:
        UsageError: the folder holds pictures of another run, or something else, or lies in a bundle.
        MachineError: the disk is full or cannot be written.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], captions: Sequence[str], *, force: bool = False
    ) -> None:
        self.folder = folder
        self.captions = captions
        self.set_aside: tuple[str, ...] = ()
        refuse_inside_bundle(folder)
        text = json.dumps(settings, indent=2) + "\n"
        self._run = hashlib.sha256(text.encode()).hexdigest()
        record = folder / SETTINGS
        with writing_to(folder):
            if folder.exists() and any(folder.iterdir()):
                self._take_over(record, json.loads(text), force)
        clear_remains(folder)
        write_whole(record, text)

    def path(self, number: int) -> Path:
        """Where a picture is, or will be."""
        return self.folder / f"{number:05d}.png"

    def missing(self) -> list[int]:
        """The numbers of the pictures that have still to be made: not there, not whole, or not of this run."""
        return [number for number in range(len(self.captions)) if not self._is_made(number)]

    def add(self, number: int, image: np.ndarray) -> None:
        """Write one picture (H, W, C) uint8; a killed run leaves none half-written."""
        info = PngInfo()
        info.add_text(KEYWORD, self._mark(number))
        with replacing(self.path(number)) as file:
            to_pil(image).save(file, format="PNG", pnginfo=info)

    def images(self) -> np.ndarray:
        """All pictures (N, H, W, C) uint8, in order.

        Raises:
            InputError: one that is missing or damaged, or has another size than the first.
        """
        arrays: list[np.ndarray] = []
        for number in range(len(self.captions)):
            arrays.append(read_image(self.path(number)))
            if arrays[-1].shape != arrays[0].shape:
                raise InputError(f"{self.path(number)} has another size than the first picture", hint="remove it")
        return np.stack(arrays)

    def write_grid(self, path: Path, columns: int | None = None) -> None:
        """Draw all pictures with their captions into one PNG file."""
        grid = draw_grid(self.images(), self.captions, columns)
        with replacing(path) as file:
            grid.save(file, format="PNG")

    def _mark(self, number: int) -> str:
        return f"{self._run} {number}"

    def _is_made(self, number: int) -> bool:
        path = self.path(number)
        return not path.is_symlink() and text_of_png(path, KEYWORD) == self._mark(number)

    def _take_over(self, record: Path, settings: Any, force: bool) -> None:
        """Make a folder that is there this run's, or refuse it."""
        if not record.is_file() or record.is_symlink():
            raise UsageError(f"{self.folder} exists and holds no samples", hint="choose another output with -o")
        found = _read_record(record)
        if found is not None and found != settings:
            if not force:
                raise UsageError(
                    f"{self.folder} holds samples of a run with other settings (see {record})",
                    hint="choose another output with -o, or replace them with --force",
                )
            self._remove(found)
        self._make_room(is_listed=found == settings)

    def _remove(self, record: Mapping[str, Any]) -> None:
        """The pictures that a record lists, by their exact names; a link is removed, and not what it points to."""
        labels = record.get(LABELS)
        for number, entry in self._numbered(len(labels) if isinstance(labels, list) else 0):
            if stat.S_ISREG(mode := entry.stat(follow_symlinks=False).st_mode) or stat.S_ISLNK(mode):
                self.path(number).unlink(missing_ok=True)

    def _make_room(self, is_listed: bool) -> None:
        """Set aside what is no picture of this run and lies where one goes; a listed file may be written over."""
        for number, entry in self._numbered(len(self.captions)):
            if self._is_made(number) or (is_listed and entry.is_file(follow_symlinks=False)):
                continue
            aside = self.path(number).with_name(entry.name + FOREIGN)
            while os.path.lexists(aside):
                aside = aside.with_name(aside.name + FOREIGN)
            self.path(number).rename(aside)
            self.set_aside += (aside.name,)

    def _numbered(self, count: int) -> list[tuple[int, os.DirEntry[str]]]:
        """What the folder has under the names of the first ``count`` pictures."""
        with os.scandir(self.folder) as entries:
            matches = [(PICTURE.fullmatch(entry.name), entry) for entry in entries]
        numbered = [(int(match[1]), entry) for match, entry in matches if match is not None and len(match[1]) < 16]
        return [(number, entry) for number, entry in numbered if number < count and entry.name == f"{number:05d}.png"]


@contextmanager
def open_gallery(
    folder: Path, settings: Mapping[str, Any], captions: Sequence[str], *, force: bool = False
) -> Iterator[Gallery]:
    """A gallery that no other process fills meanwhile; see :class:`Gallery`.

    Raises:
        UsageError: as :class:`Gallery`, or another process fills the folder.
        MachineError: the disk is full or cannot be written.
    """
    refuse_inside_bundle(folder)
    with filling(folder):
        yield Gallery(folder, settings, captions, force=force)


def _read_record(record: Path) -> dict[str, Any] | None:
    """Settings of a run; None for what a killed run, or something else, left in their place."""
    with open_input(record) as file:
        content = file.read(LARGEST_RECORD)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def draw_grid(images: np.ndarray, captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures (N, H, W, C) uint8 in rows, each under its caption.

    Args:
        columns: pictures per row; by default the grid is about square.
    """
    count, height, width = images.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    factor = max(1, -(-SMALLEST_CELL // width))
    height, width = height * factor, width * factor
    text_size = max(SMALLEST_TEXT, width // 12)
    font = ImageFont.load_default(size=text_size)
    line = text_size + MARGIN
    rows = -(-count // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + line + MARGIN) + MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * (height + line + MARGIN)
        draw.text((left, top), caption, fill="black", font=font)
        grid.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (left, top + line))
    return grid


def to_pil(image: np.ndarray) -> Image.Image:
    """(H, W, 3) or (H, W, 1) uint8 as a picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
