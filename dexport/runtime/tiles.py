"""Overlapping tiles along one side of an image, and the weights that blend them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tiles:
    """``side`` cells covered by tiles of ``size`` cells, as few as possible, evenly spread, all inside.

    Of the overlap of two neighbours the outer parts count for the tile that is further inside there; over the middle,
    ``overlap / 2`` cells, one tile fades into the other linearly. So every value is at least ``overlap / 4`` cells away
    from those edges of its tile that are not edges of the whole.

    Args:
        side, size: in cells; ``side`` is at least ``size``.
        overlap: least overlap of neighbours in cells, less than ``size``.
    """

    side: int
    size: int
    overlap: int

    def __len__(self) -> int:
        return 1 - (self.size - self.side) // (self.size - self.overlap)

    def start(self, index: int) -> int:
        """First cell of a tile."""
        return index * (self.side - self.size) // max(len(self) - 1, 1)

    def slice(self, index: int, factor: int = 1) -> slice:
        """Where a tile lies, in cells, or in pixels of which a cell has ``factor``."""
        start = self.start(index)
        return slice(start * factor, (start + self.size) * factor)

    def weights(self, index: int, factor: int) -> np.ndarray:
        """Weight of each pixel of a tile, (size * factor,) float32; those of all tiles add up to 1 everywhere."""
        place = self.slice(index, factor)
        pixels = np.arange(place.start, place.stop) + 0.5
        return (self._passed(index - 1, pixels, factor) - self._passed(index, pixels, factor)).astype(np.float32)

    def _passed(self, index: int, pixels: np.ndarray, factor: int) -> np.ndarray:
        """0 before the overlap of a tile and the next one, 1 behind it, rising linearly in its middle."""
        if index < 0:
            return np.ones_like(pixels)
        if index == len(self) - 1:
            return np.zeros_like(pixels)
        middle = (self.start(index + 1) + self.start(index) + self.size) / 2 * factor
        width = max(self.overlap * factor / 2, 1)
        return np.clip((pixels - middle) / width + 0.5, 0, 1)
