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
        furthest: where the worst of them lies, from PyTorch's choice (0) to the mean of all (1).
    """

    total: int = 0
    different: int = 0
    furthest: float = 0.0


@dataclass(frozen=True)
class Choices:
    """PyTorch's scores of everything that an output might have been.

    Attributes:
        scores: of an output (rows, ...), of every value (rows, ..., K) float32. Outputs without them are compared as
            they are.
        counts: (kind of run, output) -> what was counted.
    """

    scores: Mapping[str, np.ndarray]
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def worth(self, output: str, chosen: np.ndarray, order: Sequence[int]) -> np.ndarray:
        """The scores of what was chosen for the rows of ``order``, infinite where there is no such value."""
        if output not in self.scores:
            return chosen
        scores = self.scores[output][list(order)]
        known = (chosen >= 0) & (chosen < scores.shape[-1])
        found = np.take_along_axis(scores, np.where(known, chosen, 0)[..., None], axis=-1)[..., 0]
        return np.where(known, found, np.float32(np.inf))

    def count(self, kind: str, output: str, expected: np.ndarray, chosen: np.ndarray, order: Sequence[int]) -> None:
        """Count what is not the same."""
        if output not in self.scores:
            return
        count, different = self.counts.setdefault((kind, output), Count()), expected != chosen
        count.total += chosen.size
        count.different += int(different.sum())
        if different.any():
            best = self.worth(output, expected, order)
            lost = np.abs(self.worth(output, chosen, order) - best)[different]
            span = np.abs(self.scores[output][list(order)].mean(axis=-1) - best)[different]
            count.furthest = max(count.furthest, float(np.max(lost / np.maximum(span, np.finfo(np.float32).tiny))))

    @property
    def notes(self) -> Iterator[str]:
        """A sentence for each kind of run and output."""
        for (kind, output), count in self.counts.items():
            if not count.different:
                yield f"{output}, {kind}: all {count.total} choices are PyTorch's"
                continue
            yield (
                f"{output}, {kind}: {count.different} of {count.total} choices are not PyTorch's; by its scores the "
                f"worst lies {100 * count.furthest:.2g} % of the way from the best to the mean of all"
            )
