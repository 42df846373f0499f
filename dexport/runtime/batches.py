"""Any number of rows through a session that takes some numbers of them only: an engine's range, or a fixed batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dexport.errors import InputError


@dataclass(frozen=True)
class BatchRange:
    """The batches that a session takes, both ends included; ``most`` is None where nothing limits them."""

    least: int = 1
    most: int | None = None


def batch_range(session: Any) -> BatchRange:
    """What a session says of itself: its ``batch_range``, else a fixed first size of its first input."""
    declared = getattr(session, "batch_range", None)
    if declared is not None:
        return declared
    first = next(iter(getattr(session, "inputs", {}).values()), None)
    size = first.shape[0] if first is not None and len(first.shape) else None
    return BatchRange(size, size) if isinstance(size, int) else BatchRange()


class InBatches:
    """A session for any number of rows: more than it takes are split, fewer are filled up and cut again.

    Every input with dimensions has one row per image, as every output. Rows do not depend on each other, so what fills
    up changes nothing but the time: it is the last row again.

    Attributes:
        runner: what runs.

    Raises:
        InputError: a call gives another number of rows than it was given.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._range = batch_range(session)
        self.runner: str = getattr(session, "runner", "")

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run as often as it takes."""
        count = max((len(array) for array in inputs.values() if np.ndim(array)), default=0)
        size = self._range.most or max(count, 1)
        parts = [self._run(inputs, start, min(start + size, count)) for start in range(0, max(count, 1), size)]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, inputs: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
        count, missing = stop - start, max(0, self._range.least - (stop - start))
        filled = {name: _rows(array, start, stop, missing) for name, array in inputs.items()}
        results = self._session(**filled)
        for name, array in results.items():
            if not np.ndim(array) or len(array) != count + missing:
                raise InputError(
                    f"the model gave {name} of shape {list(np.shape(array))} for {count + missing} rows",
                    hint="build the bundle again",
                )
        return {name: array[:count] for name, array in results.items()}


def _rows(array: np.ndarray, start: int, stop: int, missing: int) -> np.ndarray:
    if not np.ndim(array):
        return array
    part = array[start:stop]
    return part if not missing else np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
