"""The only source of randomness while a program runs: seeded, recordable, replayable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dexport.errors import UsageError
from dexport.limits import LARGEST_SEED, check_whole, shown
from dexport.npz import open_npz

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIXING = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""


class Draws:
    """Random numbers for a batch of images, drawn by programs in a fixed order.

    Every image has its own stream, given by the seed and the image's number. So image 7 of seed 0 is the same whatever
    the batch size is and whichever images are made beside it: an interrupted run can make the missing ones only.
    numpy may change its streams between versions; a recording replays the same bits everywhere.

    Args:
        seed: of the whole run.
        images: the numbers of the images in this batch, one per row.
        record: keep every draw in ``draws``.

    Attributes:
        draws: what was drawn, in order, if ``record`` is set.
    """

    def __init__(self, seed: int, images: Sequence[int], *, record: bool = False) -> None:
        if seed < 0 or any(number < 0 for number in images):
            raise UsageError(
                f"seed {shown(seed)}, images {shown(list(images))}: both count from 0",
                hint="choose a seed of 0 or more",
            )
        check_whole("seed", seed, LARGEST_SEED)
        self.images = tuple(images)
        self.draws: list[np.ndarray] = []
        self._record = record
        self._streams = [np.random.default_rng([seed, number]) for number in images]

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> Draws:
        """Draws for a batch whose rows have seeds of their own: each is image 0 of its seed."""
        for seed in seeds:
            cls(seed, [0])
        draws = cls(0, [0] * len(seeds))
        draws._streams = [np.random.default_rng([seed, 0]) for seed in seeds]
        return draws

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Standard normal numbers: float32 of ``shape`` (B, ...), one row per image."""
        return self._draw(shape, lambda stream: stream.standard_normal(shape[1:], dtype=np.float32))

    def uniform(self, shape: Sequence[int]) -> np.ndarray:
        """Uniform numbers in [0, 1): float32 of ``shape`` (B, ...)."""
        return self._draw(shape, lambda stream: stream.random(shape[1:], dtype=np.float32))

    def gumbel(self, shape: Sequence[int]) -> np.ndarray:
        """Standard Gumbel numbers: float32 of ``shape`` (B, ...)."""
        return self._draw(shape, lambda stream: stream.gumbel(size=shape[1:]).astype(np.float32))

    def choices(self, shape: Sequence[int]) -> np.ndarray:
        """What :func:`choose` chooses by: uniform numbers (B, ...), or classes that were recorded themselves."""
        return self.uniform(shape)

    def categorical(self, probabilities: np.ndarray) -> np.ndarray:
        """One class per row: int64 (B, ...) of probabilities (B, ..., classes), which sum to 1 along the last axis."""
        return choose(self.choices(probabilities.shape[:-1]), probabilities)

    def permutation(self, length: int) -> np.ndarray:
        """An order of ``length`` places per image: int64 (B, length)."""
        return self._draw((len(self.images), length), lambda stream: stream.permutation(length).astype(np.int64))

    def _draw(self, shape: Sequence[int], draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        if shape[0] != len(self.images):
            raise UsageError(f"draws for {len(self.images)} images cannot fill a batch of {shape[0]}")
        drawn = np.stack([draw(stream) for stream in self._streams])
        if self._record:
            self.draws.append(drawn)
        return drawn

    def save(self, path: str | Path) -> None:
        """Write the recorded draws as one ``.npz`` file for ``Replay.load``."""
        with Path(path).open("wb") as file:
            np.savez(file, *self.draws)


def choose(numbers: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """One class per row: int64 (...) of probabilities (..., classes), which need not sum to 1.

    The classes run a race: each arrives after an exponential time of its own over its probability, and the first is
    chosen. Their times come from the row's number. So a small error of the probabilities changes the choice only where
    the two best are about as early; by thresholds of the cumulated probabilities, it would move the thresholds of all.

    Args:
        numbers: uniform (...), of :meth:`Draws.choices`; integers are the classes themselves, as the official code drew
            them, whatever the probabilities are.

    Raises:
        UsageError: recorded classes that there are not.
    """
    classes = probabilities.shape[-1]
    if numbers.dtype.kind in "iu":
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < classes:
            raise UsageError(
                f"the recording has the choice {numbers.max()} of {classes}", hint="replay it with its own network"
            )
        return numbers.astype(np.int64)
    return np.argmax(probabilities / _times(numbers, classes), axis=-1).astype(np.int64)


def _times(numbers: np.ndarray, classes: int) -> np.ndarray:
    """Exponential times float64 (..., classes) of uniform numbers (...): splitmix64 of a number's bits and a class."""
    bits = numbers.astype(np.float64).view(np.uint64)
    state = bits[..., None] * MIXING[0] + np.arange(1, classes + 1, dtype=np.uint64) * GOLDEN
    for shift, factor in zip((30, 27), MIXING, strict=True):
        state ^= state >> np.uint64(shift)
        state *= factor
    state ^= state >> np.uint64(31)
    return -np.log(((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


class Replay(Draws):
    """Draws that were recorded before, here or by the official code, in the same order.

    Where a class was chosen, the recording holds the uniform number by which it was, or, as integers, the class itself.

    Raises:
        UsageError: more draws are asked for than were recorded, or of another shape.
    """

    def __init__(self, draws: Sequence[np.ndarray]) -> None:
        super().__init__(0, range(len(draws[0])) if len(draws) else ())
        self.draws = list(draws)
        self._next = 0

    @classmethod
    def load(cls, path: str | Path) -> Replay:
        """Read what ``Draws.save`` wrote.

        Raises:
            InputError: no such file, or another content.
        """
        with open_npz(Path(path), "recorded draws") as file:
            return cls([file.read(f"arr_{index}") for index in range(len(file.names))])

    def _draw(self, shape: Sequence[int], draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:  # noqa: ARG002
        if self._next == len(self.draws):
            raise UsageError(
                f"the recording holds {len(self.draws)} draws; one more is needed",
                hint="replay with the settings that it was recorded with",
            )
        drawn = self.draws[self._next]
        if drawn.shape != tuple(shape):
            raise UsageError(
                f"draw {self._next} was recorded with shape {list(drawn.shape)}, but {list(shape)} is needed",
                hint="replay with the batch and the size that it was recorded with",
            )
        self._next += 1
        return drawn
