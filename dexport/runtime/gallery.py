"""A folder of pictures that an interrupted run can go on filling, and the grid that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dexport.bundle import refuse_inside_bundle
from dexport.drafts import clear_remains
from dexport.errors import UsageError
from dexport.files import replacing, write_whole, writing_to

SETTINGS = "run.json"
MARGIN = 4
SMALLEST_TEXT = 11
SMALLEST_CELL = 64
"""Smaller pictures are enlarged in the grid by a whole factor, so that a caption fits."""


class Gallery:
    """Numbered pictures in a folder, with the settings that made them.

    Args:
        folder: is made when it does not exist.
        settings: JSON values that fix every picture. A folder that was made with others is refused.
        captions: one per picture.
        force: start anew where the settings differ.

    Raises:
        UsageError: the folder holds pictures of another run, or something else, or lies in a bundle.
        MachineError: the disk is full or cannot be written.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], captions: Sequence[str], *, force: bool = False
    ) -> None:
        self.folder = folder
        self.captions = captions
        refuse_inside_bundle(folder)
        text = json.dumps(settings, indent=2) + "\n"
        record = folder / SETTINGS
        with writing_to(folder):
            if folder.exists() and any(folder.iterdir()):
                self._check(record, text, force)
        clear_remains(folder)
        write_whole(record, text)

    def path(self, number: int) -> Path:
        """Where a picture is, or will be."""
        return self.folder / f"{number:05d}.png"

    def missing(self) -> list[int]:
        """The numbers of the pictures that have still to be made."""
        return [number for number in range(len(self.captions)) if not self.path(number).exists()]

    def add(self, number: int, image: np.ndarray) -> None:
        """Write one picture (H, W, C) uint8; a killed run leaves none half-written."""
        with replacing(self.path(number)) as file:
            to_pil(image).save(file, format="PNG")

    def images(self) -> np.ndarray:
        """All pictures (N, H, W, C) uint8, in order."""
        arrays = [np.asarray(Image.open(self.path(number))) for number in range(len(self.captions))]
        stacked = np.stack(arrays)
        return stacked if stacked.ndim == 4 else stacked[..., None]

    def write_grid(self, path: Path, columns: int | None = None) -> None:
        """Draw all pictures with their captions into one PNG file."""
        with replacing(path) as file:
            draw_grid(self.images(), self.captions, columns).save(file, format="PNG")

    def _check(self, record: Path, settings: str, force: bool) -> None:
        if not record.is_file():
            raise UsageError(f"{self.folder} exists and holds no samples", hint="choose another output with -o")
        if record.read_text(encoding="utf-8") == settings:
            return
        if not force:
            raise UsageError(
                f"{self.folder} holds samples of a run with other settings (see {record})",
                hint="choose another output with -o, or replace them with --force",
            )
        for picture in self.folder.glob("[0-9]*.p*"):
            picture.unlink()


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
