"""How alike two pictures are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

PictureDistance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two batches of uint8 (B, H, W, C) to float64 (B,)."""
LPIPS_SMALLEST = 31
"""Pixels; of less, AlexNet's second pooling leaves nothing."""
PEAK = 255.0
SSIM_SIGMA = 1.5
SSIM_TRUNCATE = 3.5
"""With sigma 1.5 a window of 11 x 11, as published."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures (H, W, C); infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures (H, W, C), mean over pixels and channels.

    Gaussian windows, population statistics, K = (0.01, 0.03). Source: Wang et al., IEEE TIP 13(4), 2004.
    """

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (SSIM_SIGMA, SSIM_SIGMA, 0), truncate=SSIM_TRUNCATE)

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    scores = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return float(scores.mean())
