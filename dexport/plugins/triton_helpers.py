"""Loads that the kernels share. Triton inlines them."""

# Triton: constants are upper case, parameters have no types Python knows.
# mypy: ignore-errors
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, rows, columns, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``pointer[rows, columns]`` of a matrix with this row stride, zero outside of (ROWS, COLUMNS)."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_vector(pointer, columns, COLUMNS: tl.constexpr):
    """``pointer[columns]`` in float32, zero from COLUMNS on."""
    return tl.load(pointer + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
