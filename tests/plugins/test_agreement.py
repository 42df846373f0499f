"""Reference = ONNX function in ONNX Runtime = Triton kernels in the interpreter, over drawn shapes.

Errors are relative to the largest expected magnitude. ONNX Runtime has no bfloat16 matrix product on CPU:
bfloat16 is compared between reference and kernels only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from running import TOLERANCES, error, in_interpreter, in_onnxruntime, reference
from torch import Tensor

from dexport.plugins.channel_attention.op import CHANNEL_ATTENTION, POOL, SCALE
from dexport.plugins.linear_attention.op import LINEAR_ATTENTION
from dexport.plugins.op import Op
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL
from dexport.plugins.ternary_matmul.packing import pack
from dexport.plugins.tmsa.op import TMSA

HEAD_SIZES = st.sampled_from([16, 24, 40, 64, 72, 96, 128])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = 61440.0
"""15 * 2^12: above 6e4, and exact in float16; its sums of products are exact in float32 for up to 2^16
terms."""
# Without shrinking: the interpreter is slow, and the drawn shapes are small already.
few = settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def all_forms(
    op: Op, inputs: list[Tensor], attributes: dict[str, int], wide: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every computed form but the reference, with its name; skips at the kernels when there is no triton."""
    if inputs[0].dtype != torch.bfloat16:
        yield "function", in_onnxruntime(op, inputs, attributes, wide)
    pytest.importorskip("triton", reason="the kernels need triton: pip install 'dexport[plugins]'")
    yield "steps", in_interpreter(op, op.kernels, inputs, attributes)
    for kernel in (op.fused, op.plugin):
        if kernel is not None and kernel not in op.kernels:
            yield kernel.name, in_interpreter(op, (kernel,), inputs, attributes)


def check(
    op: Op,
    inputs: list[Tensor],
    attributes: dict[str, int],
    tolerance: float | None = None,
    wide: bool = False,
) -> None:
    expected = reference(op, inputs, attributes)
    assert expected.isfinite().all()
    for name, actual in all_forms(op, inputs, attributes, wide):
        assert actual.dtype == expected.dtype, name
        assert actual.shape == expected.shape, name
        assert error(actual, expected) <= (tolerance or TOLERANCES[inputs[0].dtype]), name


def tmsa_inputs(batch: int, window: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(window)
    shapes = (batch, window**2, 3 * heads * size), (batch, 3 * heads * size), (heads, (2 * window - 1) ** 2)
    return [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=st.integers(1, 2), window=st.integers(1, 7), heads=st.integers(1, 3), size=HEAD_SIZES)
@few
def test_tmsa(dtype: torch.dtype, batch: int, window: int, heads: int, size: int) -> None:
    inputs = tmsa_inputs(batch, window, heads, size, dtype)
    check(TMSA, inputs, {"num_heads": heads, "window": window})


@pytest.mark.parametrize("size", [16, 64])
def test_tmsa_of_large_half_values(size: int) -> None:
    """Logits of 6e10 overflow float16, so the body has to be the wide one; the time part is not large: it
    would break ties between keys that only exact arithmetic keeps."""
    qkv, time, table = tmsa_inputs(2, 3, 2, size, torch.float16)
    qkv = torch.where(qkv > 0, LARGE, -LARGE).to(torch.float16)
    check(TMSA, [qkv, torch.zeros_like(time), table], {"num_heads": 2, "window": 3}, wide=True)


@pytest.mark.parametrize("wide", [False, True])
def test_tmsa_adds_the_time_part_of_k_and_q_and_v(wide: bool) -> None:
    inputs = tmsa_inputs(2, 4, 2, 24, torch.float32)
    inputs[1] *= 3
    check(TMSA, inputs, {"num_heads": 2, "window": 4}, wide=wide)


def linear_inputs(batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, heads * size, generator=rng).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=st.integers(1, 2), half=st.integers(0, 40), heads=st.integers(1, 2), size=HEAD_SIZES)
@few
def test_linear_attention(dtype: torch.dtype, batch: int, half: int, heads: int, size: int) -> None:
    check(LINEAR_ATTENTION, linear_inputs(batch, 2 * half + 1, heads, size, dtype), {"num_heads": heads})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", ["q", "k", "both"])
def test_linear_attention_with_all_relus_off(dtype: torch.dtype, off: str) -> None:
    """The result then rests on eps alone, which half precision cannot add to anything."""
    q, k, v = linear_inputs(1, 9, 2, 24, dtype)
    q = -q.abs() if off in ("q", "both") else q
    k = -k.abs() if off in ("k", "both") else k
    # The interpreter's and ONNX Runtime's sums of 1e-12s differ in the last bits of float32.
    check(LINEAR_ATTENTION, [q, k, v], {"num_heads": 2}, tolerance=max(TOLERANCES[dtype], 2e-5))


def test_linear_attention_of_large_half_values() -> None:
    inputs = [(x.sign() * LARGE).to(torch.float16) for x in linear_inputs(2, 17, 2, 40, torch.float32)]
    check(LINEAR_ATTENTION, inputs, {"num_heads": 2})


def channel_inputs(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(channels)
    shapes = (batch, channels, height, width), (channels, channels, 1, 1), (channels,)
    return [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=st.integers(1, 18), channels=st.integers(1, 90), height=st.integers(1, 9), width=st.integers(1, 33))
@few
def test_channel_attention(dtype: torch.dtype, batch: int, channels: int, height: int, width: int) -> None:
    x, weight, bias = channel_inputs(batch, channels, height, width, dtype)
    check(CHANNEL_ATTENTION, [x, weight / channels**0.5, bias], {})
    pooled = reference(POOL, [x], {})
    check(POOL, [x], {}, tolerance=1e-6)
    check(SCALE, [x, pooled, weight / channels**0.5, bias], {})


def test_channel_attention_of_large_half_values() -> None:
    x, weight, bias = channel_inputs(2, 20, 3, 5, torch.float16)
    check(CHANNEL_ATTENTION, [(x.sign() * LARGE).to(torch.float16), weight, bias], {})


def ternary_inputs(batch: int, tokens: int, width: int, quarter: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(width)
    values = torch.randint(-1, 2, (4 * quarter, width), generator=rng)
    scale = torch.rand(1, generator=rng) / width**0.5
    return [torch.randn(batch, tokens, width, generator=rng).to(dtype), pack(values), scale.to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 40), width=st.integers(1, 90), quarter=st.integers(1, 50))
@few
def test_ternary_matmul(dtype: torch.dtype, batch: int, tokens: int, width: int, quarter: int) -> None:
    check(TERNARY_MATMUL, ternary_inputs(batch, tokens, width, quarter, dtype), {})


def test_ternary_matmul_of_large_half_values() -> None:
    x, weight, scale = ternary_inputs(2, 5, 1, 9, torch.float16)
    check(TERNARY_MATMUL, [(x.sign() * LARGE).to(torch.float16), weight, scale], {})
