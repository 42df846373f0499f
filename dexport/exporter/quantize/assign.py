"""Which scheme each layer gets: the smallest file within an error, or the least error within a size.

Squared errors are taken to add up. Then the best assignments, from the smallest file to the most exact, come layer by
layer: the best ones of the layers so far, each with every scheme of the next layer, without those that another one
beats in both respects. (scipy's HiGHS solves single cases of this as well, but prints to stdout, where JSON belongs.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LARGEST_FRONT = 1 << 15
"""Assignments that are kept after each layer. Up to here they are the best ones exactly; where there are more, those
within a 32768th of the range of sizes count as one."""


@dataclass(frozen=True)
class Option:
    """What a layer costs in one scheme: bytes in the file, and squared relative error of the prediction."""

    size: float
    error: float


Options = Mapping[str, Mapping[str, Option]]
"""Module path -> scheme -> cost. One scheme at least has a finite error."""


class TradeOff:
    """The best assignments of all layers.

    Attributes:
        sizes, errors: of each, by growing size and falling error.
    """

    def __init__(self, options: Options) -> None:
        self._options = {
            path: {scheme: option for scheme, option in schemes.items() if np.isfinite(option.error)}
            for path, schemes in options.items()
        }
        self.sizes, self.errors = np.zeros(1), np.zeros(1)
        self._history: list[tuple[np.ndarray, np.ndarray]] = []
        for schemes in self._options.values():
            self._add([option.size for option in schemes.values()], [option.error for option in schemes.values()])

    def smallest(self, max_error: float) -> dict[str, str] | None:
        """The assignment with the fewest bytes whose errors sum to ``max_error`` at most; None where there is none."""
        enough = np.flatnonzero(self.errors <= max_error)
        return self._assignment(int(enough[0])) if len(enough) else None

    def most_exact(self, max_size: float) -> dict[str, str] | None:
        """The assignment with the least error whose bytes sum to ``max_size`` at most; None where there is none."""
        fitting = np.flatnonzero(self.sizes <= max_size)
        return self._assignment(int(fitting[-1])) if len(fitting) else None

    def _add(self, sizes: list[float], errors: list[float]) -> None:
        size = (self.sizes[:, None] + np.array(sizes)).ravel()
        error = (self.errors[:, None] + np.array(errors)).ravel()
        order = np.lexsort((error, size))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
        order = order[error[order] < best_before]
        if len(order) > LARGEST_FRONT:
            low, high = size[order[0]], size[order[-1]]
            cell = np.floor((size[order] - low) / (high - low) * (LARGEST_FRONT - 1))
            order = order[np.concatenate([[True], np.diff(cell) > 0])]
        self._history.append((order // len(sizes), order % len(sizes)))
        self.sizes, self.errors = size[order], error[order]

    def _assignment(self, index: int) -> dict[str, str]:
        schemes: dict[str, str] = {}
        for (path, options), (parents, choices) in zip(
            reversed(self._options.items()), reversed(self._history), strict=True
        ):
            schemes[path] = list(options)[choices[index]]
            index = int(parents[index])
        return {path: schemes[path] for path in self._options}


def total_size(options: Options, schemes: Mapping[str, str]) -> float:
    """Bytes of these layers."""
    return sum(options[path][scheme].size for path, scheme in schemes.items())


def total_error(options: Options, schemes: Mapping[str, str]) -> float:
    """Squared relative error of the prediction, if errors add up."""
    return sum(options[path][scheme].error for path, scheme in schemes.items())
