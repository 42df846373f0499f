"""CIFAR-10's test images against its training images: the number in the literature. Needs the images and hours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.fid_cifar10 import EVERY, measure
from dexport.validate.features.evaluator import open_evaluator

FOLDER = os.environ.get("DEXPORT_CIFAR10", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="DEXPORT_CIFAR10 names no folder of atlases (see benchmarks/fid_cifar10.py)"),
]


@pytest.mark.timeout(14_400)
@pytest.mark.parametrize(("count", "known"), [(5000, 10.319), (EVERY, 3.15)])
def test_known_distances(count: int, known: float, tmp_path: Path) -> None:
    work = Path(os.environ.get("DEXPORT_CIFAR10_FEATURES", tmp_path))
    found = measure(Path(FOLDER), count, open_evaluator("inception"), work)
    assert found["frechet"] == pytest.approx(known, abs=0.01)
    assert abs(found["kernel x 1000"]) < 0.1
