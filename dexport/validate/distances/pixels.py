"""Features that need no network: means of pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dexport.errors import InputError
from dexport.npz import open_npz
from dexport.printable import printable

ARRAY = "arr_0"
"""Inside the ``.npz`` files of ADM and of ``numpy.savez(path, images)``."""
LARGEST_SET = 1 << 34
"""Bytes of images that are loaded at once: 80,000 of 256x256."""
POOLED_SIDE = 8
PIXELS = f"Fréchet distance ({POOLED_SIDE}x{POOLED_SIDE} pixels)"
"""Its name in reports: over mean-pooled pixels, a rough measure that needs no network. It is not FID."""


def pooled_pixels(images: np.ndarray) -> np.ndarray:
    """Features (N, 64 C) in [0, 1] of uint8 images (N, H, W, C): means over an 8x8 grid of cells."""
    count, height, width, channels = images.shape
    if height % POOLED_SIDE or width % POOLED_SIDE:
        raise InputError(f"{height}x{width} images", hint=f"both sides must be multiples of {POOLED_SIDE}")
    cells = images.reshape(count, POOLED_SIDE, height // POOLED_SIDE, POOLED_SIDE, width // POOLED_SIDE, channels)
    return cells.mean(axis=(2, 4), dtype=np.float64).reshape(count, -1) / 255


def load_images(path: Path) -> np.ndarray:
    """Images (N, H, W, C) uint8 of an ``.npz`` file with ``arr_0``, the layout of ADM's sample files.

    Raises:
        InputError: no such file, or another content.
    """
    with open_npz(path, "images") as archive:
        header = archive.header(ARRAY)
        if len(header.shape) != 4 or header.dtype != np.uint8 or 0 in header.shape:
            raise InputError(
                f"{printable(path)}: {ARRAY} is {header.dtype} {list(header.shape)}",
                hint="give (N, H, W, C) uint8",
            )
        return archive.read(ARRAY, LARGEST_SET)
