"""Integers that a graph chose as the best of many, such as the codes of an image: what they are worth to PyTorch.

Two codes that are equally near are as good as each other, and which one is taken depends on the last bit. So what is
compared is not the number but PyTorch's own score of it: a near tie costs next to nothing, and another choice as much
as it is worse. How many are not the same is counted and told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Count:
    """Of the choices of one output in the runs of one kind.

    Attributes:
        different: how many are not PyTorch's, of ``total``.
        least: the least that one is worth.
    """

    total: int = 0
    different: int = 0
    least: float = 1.0


@dataclass(frozen=True)
class Choices:
    """PyTorch's choices and its scores of everything that they might have been.

    Attributes:
        expected: output -> PyTorch's (rows, ...).
        scores: output -> of every value (rows, ..., K) float32. Outputs without them are compared as they are.
        counts: (kind of run, output) -> what was counted.
    """

    expected: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def worth(self, kind: str, output: str, chosen: np.ndarray, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What to compare for the rows of ``order``: PyTorch's, and the graph's.

        A choice is worth 1 where it scores as PyTorch's does, 0 where it scores as the mean of all; it is minus
        infinity where there is no such value. Choices of the kind of run are counted.
        """
        expected = self.expected[output][list(order)]
        if output not in self.scores:
            return expected, chosen
        scores = self.scores[output][list(order)]
        known = (chosen >= 0) & (chosen < scores.shape[-1])
        best, found = (_at(scores, values) for values in (expected, np.where(known, chosen, 0)))
        span, lost = np.abs(scores.mean(axis=-1) - best), np.abs(found - best)
        worth = np.where(known, 1 - np.divide(lost, span, out=np.sign(lost), where=span > 0), -np.inf)
        count = self.counts.setdefault((kind, output), Count())
        count.total += chosen.size
        count.different += int((expected != chosen).sum())
        count.least = min(count.least, float(worth.min()))
        return np.ones_like(worth), worth

    @property
    def notes(self) -> Iterator[str]:
        """A sentence for each kind of run and output."""
        for (kind, output), count in self.counts.items():
            if not count.different:
                yield f"{output}, {kind}: all {count.total} choices are PyTorch's"
                continue
            yield (
                f"{output}, {kind}: {count.different} of {count.total} choices are not PyTorch's; by its scores the "
                f"worst is {100 * (1 - count.least):.2g} % of the way from the best to the mean of all"
            )


def _at(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.take_along_axis(scores, values[..., None], axis=-1)[..., 0].astype(np.float64)
