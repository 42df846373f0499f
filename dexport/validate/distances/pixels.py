"""Features that need no network: means of pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dexport.errors import InputError

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
    """Images (N, H, W, C) uint8 of an ``.npz`` file with ``arr_0``, the layout of ADM's sample files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{path} holds no images: {error}", hint="give an .npz with arr_0 (N, H, W, C) uint8"
        ) from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}", hint="give (N, H, W, C) uint8")
    return images
