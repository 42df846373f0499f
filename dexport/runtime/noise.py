"""The only source of randomness while sampling: seeded, recordable, replayable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dexport.errors import UsageError
from dexport.limits import LARGEST_SEED, check_whole, shown
from dexport.npz import open_npz


class Noise:
    """Standard normal noise for a batch of images, drawn by the samplers in a fixed order.

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
    def of_seeds(cls, seeds: Sequence[int]) -> Noise:
        """Noise for a batch whose rows have seeds of their own: each is image 0 of its seed."""
        for seed in seeds:
            cls(seed, [0])
        noise = cls(0, [0] * len(seeds))
        noise._streams = [np.random.default_rng([seed, 0]) for seed in seeds]
        return noise

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """The next draw: float32 of ``shape`` (B, ...), one row per image."""
        if shape[0] != len(self.images):
            raise UsageError(f"noise for {len(self.images)} images cannot fill a batch of {shape[0]}")
        draw = np.stack([stream.standard_normal(shape[1:], dtype=np.float32) for stream in self._streams])
        if self._record:
            self.draws.append(draw)
        return draw

    def save(self, path: str | Path) -> None:
        """Write the recorded draws as one ``.npz`` file for ``Replay.load``."""
        with Path(path).open("wb") as file:
            np.savez(file, *self.draws)


class Replay(Noise):
    """Draws that were recorded before, here or by the official code, in the same order.

    Raises:
        UsageError: more draws are asked for than were recorded, or of another shape.
    """

    def __init__(self, draws: Sequence[np.ndarray]) -> None:
        super().__init__(0, range(len(draws[0])) if len(draws) else ())
        self.draws = list(draws)
        self._next = 0

    @classmethod
    def load(cls, path: str | Path) -> Replay:
        """Read what ``Noise.save`` wrote.

        Raises:
            InputError: no such file, or another content.
        """
        with open_npz(Path(path), "recorded noise") as file:
            return cls([file.read(f"arr_{index}") for index in range(len(file.names))])

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """The next recorded draw."""
        if self._next == len(self.draws):
            raise UsageError(
                f"the recording holds {len(self.draws)} draws; one more is needed",
                hint="replay with the sampler and the number of steps that it was recorded with",
            )
        draw = self.draws[self._next]
        if draw.shape != tuple(shape):
            raise UsageError(
                f"draw {self._next} was recorded with shape {list(draw.shape)}, but {list(shape)} is needed",
                hint="replay with the batch and the size that it was recorded with",
            )
        self._next += 1
        return draw
