"""Statistics of one tensor in one pass, and the clipping threshold that they suggest.

Everything is a count, a maximum or a minimum: the result does not depend on how a run was cut, so that one that was
killed and resumed ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dexport.errors import InputError

MANTISSA_BITS = 6
BINS_PER_OCTAVE = 1 << MANTISSA_BITS
_DROPPED_BITS = 23 - MANTISSA_BITS
BINS = 256 * BINS_PER_OCTAVE
"""A bin is what float32 numbers with the same exponent and leading mantissa bits have in common: it covers 1.6 % of its
value or less, and no range has to be known beforehand."""
_NOT_FINITE = 255 * BINS_PER_OCTAVE
MAGNITUDE = 0x7FFF_FFFF

LEVELS = 127
DEEPEST_CLIP_OCTAVES = 4
"""The MSE search clips to a sixteenth of the largest value at most."""
PERCENTILE = 0.9999
METHODS = ("mse", "percentile", "absmax")


@dataclass
class TensorStatistics:
    """What a tensor held over a whole calibration.

    Attributes:
        histogram: (BINS,) int64 counts of magnitudes.
        channel_absmax: (C,) float32, the largest magnitude of every channel.
        ranges: time -> (lowest, highest) value at this time.
    """

    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    channel_absmax: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    ranges: dict[float, tuple[float, float]] = field(default_factory=dict)

    def observe(self, x: np.ndarray, channel_axis: int, time: float) -> None:
        """Add a float32 tensor.

        Raises:
            InputError: NaN or infinite values.
        """
        bins = (np.ascontiguousarray(x).view(np.int32) & MAGNITUDE) >> _DROPPED_BITS
        counts = np.bincount(bins.ravel(), minlength=BINS)
        if counts[_NOT_FINITE:].any():
            raise InputError(f"{counts[_NOT_FINITE:].sum()} of {x.size} values are NaN or infinite at time {time:g}")
        self.histogram += counts
        absmax = np.abs(x).max(axis=tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim))
        self.channel_absmax = np.maximum(self.channel_absmax, absmax) if len(self.channel_absmax) else absmax
        low, high = self.ranges.get(time, (np.inf, -np.inf))
        self.ranges[time] = (min(low, float(x.min())), max(high, float(x.max())))

    @property
    def absmax(self) -> float:
        """The largest magnitude."""
        return float(self.channel_absmax.max(initial=0.0))

    def threshold(self, method: str) -> float:
        """The magnitude that code 127 stands for; larger ones are clipped to it."""
        match method:
            case "mse":
                return min(mse_threshold(self.histogram), self.absmax)
            case "percentile":
                return min(percentile_threshold(self.histogram), self.absmax)
            case "absmax":
                return self.absmax
        raise ValueError(f"no method {method!r}")

    def clipped(self, threshold: float) -> float:
        """The share of values above a threshold, to the width of a bin."""
        above = self.histogram[(int(np.float32(threshold).view(np.int32)) >> _DROPPED_BITS) + 1 :].sum()
        return float(above / max(self.histogram.sum(), 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics as arrays, for a file."""
        times = sorted(self.ranges)
        return {
            "histogram": self.histogram,
            "channel_absmax": self.channel_absmax,
            "ranges": np.array([(t, *self.ranges[t]) for t in times], np.float64).reshape(-1, 3),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TensorStatistics:
        """What ``arrays`` returned."""
        ranges = {float(t): (float(low), float(high)) for t, low, high in arrays["ranges"]}
        return cls(arrays["histogram"], arrays["channel_absmax"], ranges)


@dataclass
class LayerStatistics:
    """What a layer received, and, for a convolution larger than 1x1, what it returned before its bias.

    ``weight_absmax`` is the largest magnitude of the weight for every input channel.
    """

    weight_absmax: np.ndarray
    input: TensorStatistics = field(default_factory=TensorStatistics)
    output: TensorStatistics = field(default_factory=TensorStatistics)


Statistics = dict[str, LayerStatistics]
"""Module path -> statistics of its layer, in the order of the network's modules."""


def bin_edges(indices: np.ndarray) -> np.ndarray:
    """Smallest magnitude (float64) that lies in each bin."""
    return (indices.astype(np.int64) << _DROPPED_BITS).astype(np.int32).view(np.float32).astype(np.float64)


def percentile_threshold(histogram: np.ndarray, share: float = PERCENTILE) -> float:
    """The magnitude below which ``share`` of all values lie."""
    total = np.cumsum(histogram)
    return float(bin_edges(np.searchsorted(total, share * total[-1])[None] + 1)[0])


def mse_threshold(histogram: np.ndarray, levels: int = LEVELS) -> float:
    """The threshold with the least mean squared error of rounding and clipping together.

    A value of at least half a step is off by a uniformly distributed part of a step, a smaller one by itself.
    """
    occupied = np.flatnonzero(histogram)
    if len(occupied) == 0 or occupied[-1] == 0:
        return 0.0
    lowest = max(occupied[-1] - DEEPEST_CLIP_OCTAVES * BINS_PER_OCTAVE, 1)
    thresholds = bin_edges(np.arange(lowest, occupied[-1] + 1) + 1)[:, None]
    values = (bin_edges(occupied) + bin_edges(occupied + 1)) / 2
    values[occupied == 0] = 0.0
    steps = thresholds / levels
    rounding = np.where(values < steps / 2, values**2, steps**2 / 12)
    errors = np.where(values > thresholds, (values - thresholds) ** 2, rounding)
    return float(thresholds[np.argmin(errors @ histogram[occupied].astype(np.float64)), 0])
