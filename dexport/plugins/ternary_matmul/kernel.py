"""DexTernaryMatMul in Triton: the weights are read packed, a byte for four values, and unpacked in registers.

The four values of a byte belong to four quarters of the output's columns, so that a program has four tiles to
accumulate, each with its own product.
"""

# Triton: constants are upper case, parameters have no types Python knows.
# mypy: ignore-errors
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(x, packed, SHIFT: tl.constexpr, product, PRECISION: tl.constexpr):
    """product (M, N) + x (M, K) times the values at SHIFT of packed (N, K)."""
    values = ((packed >> SHIFT) & 3).to(tl.int8) - 1
    return tl.dot(x, tl.trans(values.to(x.dtype)), product, input_precision=PRECISION)


@triton.jit
def store_quarter(out, product, rows, columns, inside, WIDTH: tl.constexpr):
    pointers = out + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(pointers, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dex_ternary_matmul(
    x,
    weight,
    scale,
    B,
    out,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUARTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M rows of four times BLOCK_N columns. Grid: (tiles of B * T, tiles of a quarter of N)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < B * TOKENS
    column_inside = columns < QUARTER
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    third = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    fourth = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        depth_inside = depth < WIDTH
        x_tile = tl.load(
            x + rows.to(tl.int64)[:, None] * WIDTH + depth[None, :],
            mask=row_inside[:, None] & depth_inside[None, :],
            other=0.0,
        )
        # What lies outside reads as values of -1, which meet zeros of x or columns that are not stored.
        packed = tl.load(
            weight + columns[:, None] * WIDTH + depth[None, :],
            mask=column_inside[:, None] & depth_inside[None, :],
            other=0,
        )
        first = accumulate(x_tile, packed, 6, first, PRECISION)
        second = accumulate(x_tile, packed, 4, second, PRECISION)
        third = accumulate(x_tile, packed, 2, third, PRECISION)
        fourth = accumulate(x_tile, packed, 0, fourth, PRECISION)

    factor = tl.load(scale).to(tl.float32)
    inside = row_inside[:, None] & column_inside[None, :]
    store_quarter(out, first * factor, rows, columns, inside, 4 * QUARTER)
    store_quarter(out, second * factor, rows, columns + QUARTER, inside, 4 * QUARTER)
    store_quarter(out, third * factor, rows, columns + 2 * QUARTER, inside, 4 * QUARTER)
    store_quarter(out, fourth * factor, rows, columns + 3 * QUARTER, inside, 4 * QUARTER)
