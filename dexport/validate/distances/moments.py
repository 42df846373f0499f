"""Mean and covariance of features, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dexport.errors import InputError

ROWS_AT_ONCE = 4096
"""That are held in float64, to bound memory."""


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) float64 of features, and how many there were; None for one who did not say."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of (N, D) features, N at least 2; the covariance is the unbiased one."""
        running = RunningMoments()
        for start in range(0, len(features), ROWS_AT_ONCE):
            running.add(features[start : start + ROWS_AT_ONCE])
        return running.moments()


class RunningMoments:
    """Moments of features that come in batches (B, D); memory for D x D numbers, whatever their count.

    Each batch is centred on its own mean before it is added (Chan, Golub and LeVeque 1979): sums of raw squares lose
    digits where means are large.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | float = 0.0
        self._scatter: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        """Add a batch.

        Raises:
            InputError: values that are not finite.
        """
        features = features.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise InputError(
                f"the features of {len(bad)} of {len(features)} images are not finite, first of image "
                f"{self.count + int(bad[0])}",
                hint="look at that image and at the weights of the evaluator",
            )
        added = len(features)
        if added == 0:
            return
        mean = features.mean(axis=0)
        centred = features - mean
        gap = mean - self._mean
        total = self.count + added
        self._scatter = self._scatter + centred.T @ centred + np.outer(gap, gap) * (self.count * added / total)
        self._mean = self._mean + gap * (added / total)
        self.count = total

    def moments(self) -> Moments:
        """What was added so far.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"{self.count} images have no covariance", hint="give two images or more")
        return Moments(np.asarray(self._mean), np.asarray(self._scatter) / (self.count - 1), self.count)
