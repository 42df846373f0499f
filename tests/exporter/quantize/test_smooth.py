"""SmoothQuant: the product stays, the spread moves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dexport.exporter.quantize.observer import LayerStatistics
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.smooth import migration, smooth_threshold
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value

RNG = np.random.default_rng(0)
WIDTH = 16
OUTLIERS = np.where(np.arange(WIDTH) == 3, 60, 1).astype(np.float32)
W = RNG.standard_normal((WIDTH, 8), dtype=np.float32)
FEED = {
    "x": RNG.standard_normal((2, 32, WIDTH), dtype=np.float32),
    "scale": OUTLIERS * np.ones((2, 1, WIDTH), np.float32),
    "shift": RNG.standard_normal((2, 1, WIDTH), dtype=np.float32),
}
INPUT = FEED["x"] * FEED["scale"] + FEED["shift"]


def modulated(read_twice: bool = False) -> ir.Model:
    """MatMul(x * scale + shift, W), as in a block with adaptive norms."""
    x, out = value("x", ("B", 32, WIDTH)), value("out", ("B", 32, 8))
    scale, shift = value("scale", ("B", 1, WIDTH)), value("shift", ("B", 1, WIDTH))
    scaled, shifted, other = (value(name, ("B", 32, WIDTH)) for name in ("scaled", "shifted", "other"))
    w = initializer(Weight("fc.weight.T", W))
    nodes = [node("Mul", [x, scale], scaled), node("Add", [scaled, shift], shifted)]
    nodes += [node("Neg", [shifted], other)] if read_twice else []
    nodes.append(node("MatMul", [shifted, w], out, module="fc"))
    return model([x, scale, shift], [out, *([other] if read_twice else [])], nodes, [w])


def seen() -> LayerStatistics:
    statistics = LayerStatistics(np.abs(W).max(axis=1))
    statistics.input.observe(INPUT, -1, 0.0)
    return statistics


def error(built: ir.Model) -> float:
    wanted = INPUT @ W
    return float(np.linalg.norm(run(built, FEED)[0] - wanted) / np.linalg.norm(wanted))


def test_migration_balances_channels() -> None:
    statistics = seen()
    s = migration(statistics)
    assert np.allclose(statistics.input.channel_absmax / s, statistics.weight_absmax * s, rtol=1e-5)
    assert smooth_threshold(statistics, s) < statistics.input.absmax / 3


def test_channels_that_are_always_zero_stay() -> None:
    statistics = seen()
    statistics.input.channel_absmax[5] = 0
    statistics.weight_absmax[6] = 0
    s = migration(statistics)
    assert s[5] == s[6] == 1
    assert np.isfinite(s).all()


def test_it_folds_into_the_modulation_and_lowers_the_error() -> None:
    built = modulated()
    assert Plan({"fc": "w8a8"}, {"fc": seen()}).apply(built) == {"fc": "w8a8 smoothed"}
    assert ops(built).count("Mul") == 3
    assert {n.name for n in built.graph} >= {"fc/scale", "fc/shift"}
    plain = modulated(read_twice=True)
    Plan({"fc": "w8a8"}, {"fc": seen()}).apply(plain)
    assert error(built) < 0.7 * error(plain)


def test_a_modulation_with_other_readers_stays() -> None:
    built = modulated(read_twice=True)
    assert Plan({"fc": "w8a8"}, {"fc": seen()}).apply(built) == {"fc": "w8a8"}
    assert ops(built).count("Mul") == 1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_is_the_share_that_the_weights_take(alpha: float) -> None:
    s = migration(seen(), alpha)
    spread = np.ptp(np.log(seen().input.channel_absmax / s))
    assert spread <= np.ptp(np.log(seen().input.channel_absmax)) * (1 - alpha) + np.ptp(np.log(seen().weight_absmax))
