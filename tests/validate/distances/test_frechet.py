"""Distances between image sets: known values, symmetry, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dexport.errors import InputError
from dexport.validate.distances import Moments, frechet_distance, load_images, pooled_pixels


def features(seed: int, count: int = 50, dim: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)


def test_of_gaussians_that_commute() -> None:
    """Diagonal covariances: |m|^2 + sum (s - r)^2."""
    a = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 2)
    b = Moments(np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0]), 2)
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4)


@given(st.integers(0, 1000))
def test_it_is_a_distance(seed: int) -> None:
    a, b = Moments.of(features(seed)), Moments.of(features(seed + 1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0


def test_fewer_images_than_features_are_no_problem() -> None:
    few = Moments.of(features(0, count=3, dim=16))
    assert 0 < frechet_distance(few, Moments.of(features(1, count=3, dim=16))) < np.inf


@pytest.mark.parametrize("bad", [features(0, count=1), np.full((5, 2), np.nan)])
def test_features_that_have_no_moments(bad: np.ndarray) -> None:
    with pytest.raises(InputError):
        Moments.of(bad)


def test_pooled_pixels_are_means_of_cells() -> None:
    images = np.zeros((1, 16, 24, 1), np.uint8)
    images[0, :2, :3] = 255
    pooled = pooled_pixels(images)
    assert (pooled.shape, pooled[0, 0], pooled[0, 1:].max()) == ((1, 64), 1.0, 0.0)
    with pytest.raises(InputError, match="12x8"):
        pooled_pixels(np.zeros((1, 12, 8, 1), np.uint8))


def test_images_of_a_sample_file(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images)
    assert load_images(tmp_path / "a.npz").shape == images.shape
    np.savez(tmp_path / "b.npz", images.astype(np.float32))
    (tmp_path / "c.npz").write_bytes(b"no zip")
    for name in ("b", "c", "missing"):
        with pytest.raises(InputError, match=name):
            load_images(tmp_path / f"{name}.npz")
