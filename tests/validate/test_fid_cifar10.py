"""CIFAR-10's test images against its training images: the number in the literature. Needs the images and an hour."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.fid_cifar10 import measure

FOLDER = os.environ.get("DEXPORT_CIFAR10", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="DEXPORT_CIFAR10 names no folder of atlases (see benchmarks/fid_cifar10.py)"),
]


@pytest.mark.timeout(7200)
def test_all_images() -> None:
    frechet, kernel, *counts = measure(Path(FOLDER), None)
    assert counts == [10_000, 50_000]
    assert frechet == pytest.approx(3.15, abs=0.01)
    assert abs(kernel) < 1e-4


@pytest.mark.timeout(3600)
def test_5000_images_of_each() -> None:
    frechet, *_ = measure(Path(FOLDER), 5000)
    assert frechet == pytest.approx(10.319, abs=0.01)
