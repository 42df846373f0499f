"""Which scheme each layer gets: the smallest file within an error, or the least error within a size.

Squared errors are taken to add up. Then this is a multiple-choice knapsack, which scipy's HiGHS solves exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


@dataclass(frozen=True)
class Option:
    """What a layer costs in one scheme: bytes in the file, and squared relative error of the prediction."""

    size: float
    error: float


Options = Mapping[str, Mapping[str, Option]]
"""Module path -> scheme -> cost."""


def smallest(options: Options, max_error: float) -> dict[str, str] | None:
    """The assignment with the fewest bytes whose errors sum to ``max_error`` at most; None where there is none."""
    size, error = _columns(options)
    return _solve(options, objective=size, limited=error, limit=max_error)


def most_exact(options: Options, max_size: float) -> dict[str, str] | None:
    """The assignment with the least error whose bytes sum to ``max_size`` at most; None where there is none."""
    size, error = _columns(options)
    return _solve(options, objective=error, limited=size, limit=max_size)


def total_size(options: Options, schemes: Mapping[str, str]) -> float:
    return sum(options[path][scheme].size for path, scheme in schemes.items())


def total_error(options: Options, schemes: Mapping[str, str]) -> float:
    return sum(options[path][scheme].error for path, scheme in schemes.items())


def _columns(options: Options) -> tuple[np.ndarray, np.ndarray]:
    flat = [option for schemes in options.values() for option in schemes.values()]
    return np.array([option.size for option in flat]), np.array([option.error for option in flat])


def _solve(options: Options, objective: np.ndarray, limited: np.ndarray, limit: float) -> dict[str, str] | None:
    possible = (limited <= limit) & np.isfinite(objective)
    share = np.where(possible, limited, 0) / limit if limit > 0 else np.zeros_like(limited)
    cost = np.where(possible, objective, 0)
    layer_of = np.repeat(np.arange(len(options)), [len(schemes) for schemes in options.values()])
    one_each = csr_array((np.ones(len(cost)), (layer_of, np.arange(len(cost)))), shape=(len(options), len(cost)))
    result = milp(
        cost / (cost.max(initial=0) or 1),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, possible.astype(float)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(share[None], -np.inf, 1)],
    )
    if result.x is None:
        return None
    names = [(path, scheme) for path, schemes in options.items() for scheme in schemes]
    return {path: scheme for (path, scheme), taken in zip(names, result.x, strict=True) if taken > 0.5}
