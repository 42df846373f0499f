"""Fixtures: small denoisers to sample with, narrow DiTs of the Fashion-MNIST shapes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dexport

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2}


def build_narrow(path: Path, recipe: str | None = "dit-fashion", **options: Any) -> Path:
    dexport.build(recipe, path, settings=NARROW, profile="ci", parity=False, **options)
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_narrow(tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with other weights."""
    return build_narrow(tmp_path_factory.mktemp("other") / "bundle", seed=1)


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Guidance inside of the graph."""
    return build_narrow(tmp_path_factory.mktemp("fused") / "fused", guidance="fused")


@pytest.fixture(scope="session")
def stitched(plain: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stitched") / "bundle"
    dexport.build(None, path, stitch=f"{plain}:0.4,{other}:0.6")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained model."""
    path = tmp_path_factory.mktemp("trained") / "bundle"
    checkpoint = Path(__file__).parent.parent / "checkpoints" / "dit-fashion-s.safetensors"
    dexport.build("dit-fashion-s", path, checkpoint=str(checkpoint), profile="ci", parity=False)
    return path


def trained_inputs() -> dict[str, np.ndarray]:
    """One step in the middle, three rows: two classes and the null label."""
    x = np.random.default_rng(0).standard_normal((3, 4, 16, 16), dtype=np.float32)
    return {"x": x, "t": np.array([20, 500, 980], np.float32), "y": np.array([1, 8, 10])}
