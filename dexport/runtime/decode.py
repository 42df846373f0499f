"""From what a denoiser produced to images: a VAE session, in tiles where the latent is larger than its graph, or none.

Latents and images are (batch, channels, height, width) throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from dexport.errors import GateError, InputError, UsageError
from dexport.runtime.batches import InBatches
from dexport.runtime.tiles import Tiles

MAX_BATCH = 4
"""Latents decoded at once where the graph leaves the batch open: the activations of a VAE are large."""
OVERLAP = 0.25
GRID_DIMS = 4
CHANNELS_LAST = (0, 2, 3, 1)
PICTURE_CHANNELS = (1, 3)
"""Grey and RGB."""


class Decoder(Protocol):
    """Latents in the denoiser's scale, (B, C, h, w) float32 -> images (B, 3 or 1, H, W) float32 in [-1, 1], clipped."""

    def __call__(self, latents: np.ndarray, /) -> np.ndarray: ...


class DecoderSession(Protocol):
    """What a :class:`VaeDecoder` needs of a session: the shape of ``z``, and ``session(z=array)["image"]``."""

    @property
    def inputs(self) -> Mapping[str, Any]: ...

    def __call__(self, **inputs: np.ndarray) -> Mapping[str, np.ndarray]: ...


class VaeDecoder:
    """A decoder graph with a fixed spatial size, for latents of that size and larger ones.

    A larger latent is cut into overlapping tiles of exactly the graph's size, which are blended. Near the edge of a
    tile the decoder sees padding in place of the neighbourhood, so the values next to it are dropped
    (:class:`~dexport.runtime.tiles.Tiles`). Norms and attention still see one tile only: the result is close to that of
    a graph for the whole, and equal only where the receptive field is at most a quarter of the overlap.

    Args:
        session: takes ``z`` (B, C, h, w) and gives ``image`` (B, channels, f*h, f*w).
        latent_scale: latents are divided by it.
        overlap: least overlap of neighbouring tiles, as a fraction of their side.
        black: its value in the session's images, where white is 1.

    Raises:
        UsageError: such a scale or overlap is not possible, or the session takes something else.
    """

    def __init__(
        self, session: DecoderSession, latent_scale: float, overlap: float = OVERLAP, black: float = -1.0
    ) -> None:
        if not math.isfinite(latent_scale) or latent_scale == 0:
            raise UsageError(f"latents cannot be divided by {latent_scale}", hint="the scale of the SD VAE is 0.18215")
        if not 0 <= overlap < 1:
            raise UsageError(f"tiles cannot overlap by {overlap} of their side", hint="for example 0.25")
        if list(session.inputs) != ["z"]:
            raise UsageError(
                f"this model takes {', '.join(session.inputs)}, but a decoder takes z", hint="build sd-vae-decoder"
            )
        if len(session.inputs["z"].shape) != GRID_DIMS:
            raise UsageError(
                f"this model takes z of shape {list(session.inputs['z'].shape)}, but a decoder takes a grid of latents",
                hint="run it with dexport.load",
            )
        self._session = InBatches(session)
        self._latent_scale = latent_scale
        self._overlap = overlap
        self._black = black
        batch, _, *self._sides = session.inputs["z"].shape
        self._fixed_batch = batch if isinstance(batch, int) else None

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Raises UsageError for a latent smaller than a tile, or one that the session refuses."""
        _check_latents(latents)
        z = np.asarray(latents / self._latent_scale, dtype=np.float32)
        rows, columns = (self._tiles(axis, z.shape) for axis in (0, 1))
        images = np.zeros(0, np.float32)
        for row, column in itertools.product(range(len(rows)), range(len(columns))):
            tile = self._decode(z[:, :, rows.slice(row), columns.slice(column)])
            factor = _factor(tile, len(z), (rows.size, columns.size))
            if not images.size:
                images = np.zeros((*tile.shape[:2], rows.side * factor, columns.side * factor), np.float32)
            weights = np.outer(rows.weights(row, factor), columns.weights(column, factor))
            images[:, :, rows.slice(row, factor), columns.slice(column, factor)] += tile * weights
        return clipped(from_black(images, self._black))

    def _tiles(self, axis: int, shape: tuple[int, ...]) -> Tiles:
        """Tiles along the height (0) or the width (1); a side that the graph leaves open takes the whole."""
        side, size = shape[2 + axis], self._sides[axis]
        if not isinstance(size, int):
            size = side
        if side < size:
            raise UsageError(
                f"a latent of {shape[2]}x{shape[3]} is smaller than the tiles of "
                f"{self._sides[0]}x{self._sides[1]} that this decoder takes",
                hint=f"build one for it: dexport build sd-vae-decoder --latent {shape[2]}x{shape[3]}",
            )
        return Tiles(side, size, int(size * self._overlap))

    def _decode(self, z: np.ndarray) -> np.ndarray:
        """Run the session over latents of its own size, in batches that it takes."""
        size = self._fixed_batch or MAX_BATCH
        return np.concatenate([self._session(z=z[start : start + size])["image"] for start in range(0, len(z), size)])


class CodeDecoder:
    """A decoder graph of codes: codes (B, ...) int64 -> images (B, C, H, W) float32 in [-1, 1], clipped.

    Codes come in any shape of as many as the graph takes for a picture, row by row.

    Args:
        session: takes ``z``, the codes, and gives ``image``.
        black: its value in the session's images, where white is 1.

    Raises:
        UsageError: the session takes something else.
    """

    def __init__(self, session: DecoderSession, black: float = -1.0) -> None:
        if list(session.inputs) != ["z"]:
            raise UsageError(
                f"this model takes {', '.join(session.inputs)}, but a decoder takes codes",
                hint="build a decoder of codes, such as llamagen-vq16-decoder",
            )
        self._session = InBatches(session)
        self._black = black
        batch, *self._places = session.inputs["z"].shape
        self._size = batch if isinstance(batch, int) else MAX_BATCH

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Raises UsageError for another number of codes than the graph takes."""
        count, wanted = math.prod(codes.shape[1:]), math.prod(self._places)
        if codes.dtype.kind not in "iu" or not len(codes) or count != wanted:
            raise UsageError(
                f"codes are {codes.dtype} {list(codes.shape)}, and this decoder takes {wanted} whole numbers a picture",
                hint="build the decoder for this size with --latent HEIGHTxWIDTH",
            )
        z = codes.astype(np.int64).reshape(len(codes), *self._places)
        images = [self._session(z=z[start : start + self._size])["image"] for start in range(0, len(z), self._size)]
        return clipped(from_black(np.concatenate(images), self._black))


class PixelShuffle:
    """No network: the channels of a cell are a square of pixels, (B, C*f*f, h, w) -> (B, C, h*f, w*f), clipped.

    The order of channels is that of ``torch.nn.PixelShuffle``.

    Args:
        tiles: the shuffled picture is a sheet of tiles x tiles thumbnails. Tile (i, j) holds the pixels at offset
            (i, j) of every square of tiles x tiles pixels, and goes back there.
    """

    def __init__(self, factor: int, tiles: int = 1) -> None:
        if factor < 1 or tiles < 1:
            raise UsageError(f"pixels cannot be shuffled by a factor of {min(factor, tiles)}", hint="give 1 or more")
        self.factor = factor
        self.tiles = tiles

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Raises UsageError where the channels are no multiple of the factor's square, or the tiles do not fit."""
        _check_latents(latents)
        batch, channels, height, width = latents.shape
        f, tiles = self.factor, self.tiles
        if channels % (f * f):
            raise UsageError(f"{channels} channels are no multiple of {f * f}, as a pixel shuffle by {f} needs")
        if height * f % tiles or width * f % tiles:
            raise UsageError(f"{height * f}x{width * f} pixels are no sheet of {tiles}x{tiles} equal tiles")
        cells = latents.reshape(batch, -1, f, f, height, width).transpose(0, 1, 4, 2, 5, 3)
        sheet = cells.reshape(batch, -1, tiles, height * f // tiles, tiles, width * f // tiles)
        images = sheet.transpose(0, 1, 3, 2, 5, 4).reshape(batch, -1, height * f, width * f)
        return clipped(images)


def from_black(images: np.ndarray, black: float) -> np.ndarray:
    """Images whose black is ``black`` and whose white is 1, in [-1, 1]."""
    return images if black == -1 else (images - black) * (2 / (1 - black)) - 1


def clipped(images: np.ndarray) -> np.ndarray:
    """Images (B, C, H, W) float32 in [-1, 1]. What is not finite is refused here, as a clipped infinity is white.

    Raises:
        GateError, InputError: see :func:`check_values`.
    """
    check_values(images)
    return np.clip(images, -1, 1).astype(np.float32)


def check_values(images: np.ndarray) -> None:
    """Refuse what is no image, whatever its channels.

    Raises:
        GateError: values that are not finite, which would be shown as black or white.
        InputError: another rank than that of (B, C, H, W), none, or no floating-point numbers.
    """
    if not isinstance(images, np.ndarray) or images.dtype.kind != "f":
        found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"the decoder made {found} values, expected float32", hint="build the decoder again")
    if images.ndim != GRID_DIMS or not images.size:
        raise _wrong_shape(images)
    if not np.isfinite(images).all():
        raise GateError(
            "the decoder made values that are not finite",
            hint="if its precision overflows, build it with --bf16, --fp32, or more --island",
        )


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8: (x + 1) * 127.5, rounded half to even, clipped.

    Raises:
        GateError, InputError: see :func:`check_values`; also for other than 1 or 3 channels.
    """
    check_values(images)
    if images.shape[1] not in PICTURE_CHANNELS:
        raise _wrong_shape(images)
    levels = np.rint((images.astype(np.float32) + 1) * 127.5)
    return np.ascontiguousarray(np.clip(levels, 0, 255).transpose(CHANNELS_LAST)).astype(np.uint8)


def _factor(tile: np.ndarray, count: int, cells: tuple[int, int]) -> int:
    """How many pixels a cell has along each side."""
    check_values(tile)
    factor = tile.shape[2] // cells[0]
    if tile.shape[0] != count or factor < 1 or tile.shape[2:] != (cells[0] * factor, cells[1] * factor):
        raise InputError(
            f"the decoder made pictures of shape {list(tile.shape)} of {count} latents of {cells[0]}x{cells[1]}, "
            "expected one each, larger by a whole factor",
            hint="build the decoder again",
        )
    return factor


def _wrong_shape(images: np.ndarray) -> InputError:
    return InputError(
        f"the decoder made pictures of shape {list(images.shape)}, expected (batch, 1 or 3 channels, height, width)",
        hint="give the decoder that these latents were trained with",
    )


def _check_latents(latents: np.ndarray) -> None:
    if latents.ndim != 4 or not latents.size:
        raise UsageError(f"latents have shape {list(latents.shape)}, expected (batch, channels, height, width)")
