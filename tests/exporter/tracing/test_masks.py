"""Masks of infinite and of huge numbers, in every precision: the softmax under them stays what it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

import dexport
from dexport.errors import InputError
from dexport.exporter.passes.emulate_low_precision import EmulateLowPrecision
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.torch_session import TorchSession
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights
from dexport.validate.compare.block_errors import relative_l2
from dexport.validate.levels.forward import ParityReport, reference_outputs
from dexport.validate.metrics import compare
from tests.exporter.masked_networks import LOWEST, VALUES, Masked, masked
from tests.exporter.passes.model import Weight, initializer, model, node, run, value

TOLERANCE = {"fp16": 3e-3, "bf16": 3e-2}
CASES = [
    ("added_buffer", "inf", {"precision": "fp16"}),
    ("stored_buffer", "inf", {"precision": "bf16"}),
    ("stored_buffer", "1e9", {"precision": "fp16"}),
    ("filled", "lowest", {"precision": "bf16"}),
    ("chosen", "1e9", {"precision": "fp16"}),
    ("multiplied", "1e9", {"precision": "fp16"}),
    ("made_in_forward", "inf", {"precision": "fp16"}),
    ("made_in_forward", "lowest", {"precision": "bf16"}),
    ("hidden_row", "inf", {"precision": "fp16"}),
    ("hidden_row", "1e9", {"precision": "fp16"}),
    ("hidden_row", "lowest", {"precision": "bf16"}),
    ("hidden_row", "inf", {"precision": "auto"}),
    ("added_buffer", "1e9", {"precision": "auto"}),
    ("added_buffer", "inf", {"int8": "weight"}),
    ("sdpa", "inf", {"precision": "fp16"}),
    ("sdpa", "lowest", {"precision": "bf16"}),
]


@pytest.mark.parametrize(("way", "number", "options"), CASES, ids=str)
def test_a_network_with_a_mask_builds_and_passes(
    way: str, number: str, options: dict[str, Any], tmp_path: Path
) -> None:
    result = dexport.build(masked(way, number), tmp_path / "out", profile="ci", **options)
    assert isinstance(result.verdict, ParityReport)
    assert result.verdict.passed


def attention(mask: np.ndarray, islands: Islands, precision: str, *, scaled: bool = False) -> ir.Model:
    """softmax(x + mask), or softmax(x + (x * 0 + 1) * mask)."""
    rows = mask.shape[0]
    x, w = value("x", ("B", rows, rows)), initializer(Weight("mask", mask))
    weights = [w]
    nodes, added = [], w
    if scaled:
        zero, one = (
            initializer(Weight("zero", np.zeros(1, np.float32))),
            initializer(Weight("one", np.ones(1, np.float32))),
        )
        weights += [zero, one]
        a, b, added = (value(name, ("B", rows, rows)) for name in ("a", "b", "c"))
        nodes = [node("Mul", [x, zero], a), node("Add", [a, one], b), node("Mul", [b, w], added)]
    scores, out = value("scores", ("B", rows, rows)), value("out", ("B", rows, rows))
    nodes += [node("Add", [x, added], scores), node("Softmax", [scores], out, axis=-1)]
    return ToLowPrecision(precision, islands)(model([x], [out], nodes, weights)).model


def softmax(scores: np.ndarray) -> np.ndarray:
    return torch.from_numpy(scores).softmax(-1).numpy()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("number", [-math.inf, -1e5, -1e9, LOWEST])
@pytest.mark.parametrize("islands", [Islands(), Islands(ops=())], ids=["softmax in float32", "all low"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_softmax_under_a_mask(number: float, islands: Islands, precision: str, scaled: bool) -> None:
    mask = np.triu(np.full((6, 6), number, np.float32), 1)
    x = np.random.default_rng(0).standard_normal((2, 6, 6), dtype=np.float32)
    if scaled and math.isinf(number):
        mask[mask == 0] = 0.0  # 1 times infinity is infinity
    built = attention(mask, islands, precision, scaled=scaled)
    EmulateLowPrecision()(built)
    (out,) = run(built, {"x": x})
    assert np.isfinite(out).all()
    assert relative_l2(softmax(x + mask), out) < TOLERANCE[precision]


@pytest.mark.parametrize("number", [-1e9, LOWEST])
def test_a_row_that_is_masked_as_a_whole_is_uniform(number: float) -> None:
    mask = np.zeros((4, 4), np.float32)
    mask[2] = number
    x = np.random.default_rng(1).standard_normal((1, 4, 4), dtype=np.float32)
    (out,) = run(attention(mask, Islands(), "fp16"), {"x": x})
    np.testing.assert_allclose(out[0, 2], 0.25, rtol=1e-3)


def multiplied(array: np.ndarray, precision: str = "fp16") -> torch.Tensor:
    """What becomes of a weight that is no mask."""
    x, w, out = value("x", ("B", 4)), initializer(Weight("w", array)), value("out", ("B", 4))
    built = ToLowPrecision(precision, Islands(ops=()))(model([x], [out], [node("Mul", [x, w], out)], [w])).model
    return torch.from_numpy(built.graph.initializers["w"].const_value.numpy().astype(np.float32))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("number", [math.inf, -math.inf])
def test_what_was_infinite_stays_so(number: float, precision: str) -> None:
    array = np.array([1, number, 0, -2], np.float32)
    assert multiplied(array, precision).tolist() == array.tolist()


@pytest.mark.parametrize("numbers", [[1e5, 0, 0, 0], [-1e9, 0, 1, 2], [-math.inf, 7e4, 0, 0]])
def test_what_was_finite_and_is_no_mask_is_refused(numbers: list[float]) -> None:
    with pytest.raises(InputError, match=r"w holds .*, more than torch.float16 can represent"):
        multiplied(np.array(numbers, np.float32))


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="w holds NaN"):
        multiplied(np.array([1, math.nan, math.inf, 0], np.float32))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_limits_of_float32_become_those_of_the_type(precision: str) -> None:
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    got = multiplied(np.array([LOWEST, -LOWEST, 1, 0], np.float32), precision).tolist()
    assert got == [torch.finfo(low).min, torch.finfo(low).max, 1, 0]


@pytest.mark.parametrize("number", ["inf", "1e9", "lowest"])
def test_a_mask_in_a_checkpoint_is_no_diverged_run(number: str, tmp_path: Path) -> None:
    variant = resolve(masked("stored_buffer", number))
    state = Masked("stored_buffer", number).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    weights = open_weights(tmp_path / "mine.safetensors", variant.outline)
    assert torch.equal(weights.read("stored", torch.float32), state["stored"])


@pytest.mark.parametrize(
    ("name", "number", "stored_as"),
    [
        ("qkv.weight", math.inf, torch.float32),
        ("qkv.bias", -math.inf, torch.float32),
        ("stored", math.nan, torch.float32),
        ("stored", 1e300, torch.float64),
    ],
)
def test_parameters_and_what_is_no_mask_stay_finite(
    name: str, number: float, stored_as: torch.dtype, tmp_path: Path
) -> None:
    variant = resolve(masked("stored_buffer", "1e4"))
    state = Masked("stored_buffer", "1e4").state_dict()
    state[name] = state[name].to(stored_as).clone()
    state[name].view(-1)[3] = number
    save_file(state, tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite"):
        open_weights(tmp_path / "mine.safetensors", variant.outline).read(name, torch.float32)


def test_infinite_values_compare_as_equal_and_nothing_else_does() -> None:
    reference = np.array([1.0, -math.inf, 2.0], np.float32)
    same, other = compare(reference, reference + np.float32(1e-3)), compare(reference, np.array([1.0, -9.0, 2.0]))
    assert same.finite
    assert same.relative_l2 < 1e-2
    assert not compare(reference, np.array([1.0, math.inf, 2.0])).finite
    assert not compare(np.array([1.0, math.nan]), np.array([1.0, math.nan])).finite
    assert not (other.relative_l2 < math.inf)
    assert relative_l2(reference, reference) == 0
    assert relative_l2(reference, -reference) == math.inf
    assert relative_l2(reference, np.array([1.0, 0.0, 2.0])) == math.inf


def test_a_reference_that_is_no_number_is_said() -> None:
    variant = resolve(masked("added_buffer", "inf"))
    network = variant.module()
    network.mask[5] = -math.inf  # a row that is masked as a whole, and nothing replaces its NaN
    session = TorchSession(network, variant.signature)
    weights = open_weights(None, variant.outline)
    with pytest.raises(InputError, match="mine: out is NaN in PyTorch's float32"):
        reference_outputs(variant, weights, variant.signature.example(2), 2, session)


def test_every_number_is_tried() -> None:
    assert {number for _, number, _ in CASES} | {"1e4"} == set(VALUES)
