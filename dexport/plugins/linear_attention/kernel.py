"""DexLinearAttention in Triton: ReLU features, float32 state, no product of size T x T.

Two forms: ``dex_linear_attention_state`` then ``dex_linear_attention_apply`` (more programs, the state goes
through memory), and ``dex_linear_attention``, one kernel in which each program keeps its columns of the
state in registers. A TensorRT plugin with an ahead-of-time implementation is one kernel, so it takes the
second form.

The feature map is relu(x) + eps. 1e-6 vanishes beside relu(k) in half precision, so the state multiplies
relu(k), exact in the input type, and adds eps * sum(v) in float32.
"""

# Triton: constants are upper case, parameters have no types Python knows.
# mypy: ignore-errors
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from dexport.plugins.triton_helpers import load_tile, load_vector


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0).to(x.dtype)


@triton.jit
def query_features(
    pointer, rows, columns, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr
):
    """relu(q) + eps in float32; zero in the padded columns."""
    q = relu(load_tile(pointer, rows, columns, STRIDE, ROWS, COLUMNS)).to(tl.float32)
    return tl.where((columns < COLUMNS)[None, :], q + EPS, 0.0)


@triton.jit
def dex_linear_attention_state(
    k,
    v,
    state,
    mean_k,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: a (BLOCK_K, BLOCK_V) tile of one head's state. Grid: (tiles of k, tiles of v, B * heads).

    Writes state (B, heads, d, d) = k'^T v / N and mean_k (B, heads, d) = mean of k', with k' = relu(k) + eps.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    batch_head = tl.program_id(2)
    start_of_head = (batch_head // HEADS).to(tl.int64) * (TOKENS * WIDTH) + (batch_head % HEADS) * HEAD_DIM
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)

    product = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    sum_k = tl.zeros((BLOCK_K,), tl.float32)
    sum_v = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, TOKENS, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        k_tile = relu(load_tile(k + start_of_head, tokens, rows, WIDTH, TOKENS, HEAD_DIM))
        v_tile = load_tile(v + start_of_head, tokens, columns, WIDTH, TOKENS, HEAD_DIM)
        product = tl.dot(tl.trans(k_tile), v_tile, product, input_precision=PRECISION)
        sum_k += tl.sum(k_tile.to(tl.float32), 0)
        sum_v += tl.sum(v_tile.to(tl.float32), 0)

    product = (product + EPS * sum_v[None, :]) / TOKENS
    inside = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    state_of_head = state + batch_head.to(tl.int64) * (HEAD_DIM * HEAD_DIM)
    tl.store(state_of_head + rows[:, None] * HEAD_DIM + columns[None, :], product, mask=inside)
    # The programs of every tile of v hold the same sums; one of them writes.
    if tl.program_id(1) == 0:
        tl.store(mean_k + batch_head * HEAD_DIM + rows, sum_k / TOKENS + EPS, mask=rows < HEAD_DIM)


@triton.jit
def dex_linear_attention_apply(
    q,
    state,
    mean_k,
    out,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: (BLOCK_T, BLOCK_V) of one head's output. Grid: (tiles of T, tiles of v, B * heads)."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    batch_head = tl.program_id(2)
    start_of_head = (batch_head // HEADS).to(tl.int64) * (TOKENS * WIDTH) + (batch_head % HEADS) * HEAD_DIM
    state_of_head = state + batch_head.to(tl.int64) * (HEAD_DIM * HEAD_DIM)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)

    numerator = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    denominator = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        features = query_features(q + start_of_head, tokens, rows, WIDTH, TOKENS, HEAD_DIM, EPS)
        state_tile = load_tile(state_of_head, rows, columns, HEAD_DIM, HEAD_DIM, HEAD_DIM)
        numerator = tl.dot(features, state_tile, numerator, input_precision=PRECISION)
        mean_tile = load_vector(mean_k + batch_head * HEAD_DIM, rows, HEAD_DIM)
        denominator += tl.sum(features * mean_tile[None, :], 1)

    result = (numerator / (denominator + EPS)[:, None]).to(out.dtype.element_ty)
    inside = (tokens < TOKENS)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out + start_of_head + tokens[:, None] * WIDTH + columns[None, :], result, mask=inside)


@triton.jit
def dex_linear_attention(
    q,
    k,
    v,
    out,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_REST: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: BLOCK_V output columns of one head, for all tokens. Grid: (tiles of v, B * heads).

    Its columns of the state stay in registers. k and q are read once per program.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    batch_head = tl.program_id(1)
    start_of_head = (batch_head // HEADS).to(tl.int64) * (TOKENS * WIDTH) + (batch_head % HEADS) * HEAD_DIM
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    main = tl.arange(0, HEAD_MAIN)
    state_main = tl.zeros((HEAD_MAIN, BLOCK_V), tl.float32)
    mean_main = tl.zeros((HEAD_MAIN,), tl.float32)
    sum_v = tl.zeros((BLOCK_V,), tl.float32)
    if HEAD_REST > 0:
        rest = HEAD_MAIN + tl.arange(0, HEAD_REST)
        state_rest = tl.zeros((HEAD_REST, BLOCK_V), tl.float32)
        mean_rest = tl.zeros((HEAD_REST,), tl.float32)

    for start in range(0, TOKENS, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        v_tile = load_tile(v + start_of_head, tokens, columns, WIDTH, TOKENS, HEAD_DIM)
        sum_v += tl.sum(v_tile.to(tl.float32), 0)
        k_main = relu(load_tile(k + start_of_head, tokens, main, WIDTH, TOKENS, HEAD_DIM))
        state_main = tl.dot(tl.trans(k_main), v_tile, state_main, input_precision=PRECISION)
        mean_main += tl.sum(k_main.to(tl.float32), 0)
        if HEAD_REST > 0:
            k_rest = relu(load_tile(k + start_of_head, tokens, rest, WIDTH, TOKENS, HEAD_DIM))
            state_rest = tl.dot(tl.trans(k_rest), v_tile, state_rest, input_precision=PRECISION)
            mean_rest += tl.sum(k_rest.to(tl.float32), 0)

    # Padded rows of the state and of the mean meet query features that are zero.
    state_main = (state_main + EPS * sum_v[None, :]) / TOKENS
    mean_main = mean_main / TOKENS + EPS
    if HEAD_REST > 0:
        state_rest = (state_rest + EPS * sum_v[None, :]) / TOKENS
        mean_rest = mean_rest / TOKENS + EPS

    for start in range(0, TOKENS, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        features = query_features(q + start_of_head, tokens, main, WIDTH, TOKENS, HEAD_DIM, EPS)
        numerator = tl.dot(features, state_main, input_precision=PRECISION)
        denominator = tl.sum(features * mean_main[None, :], 1)
        if HEAD_REST > 0:
            features = query_features(q + start_of_head, tokens, rest, WIDTH, TOKENS, HEAD_DIM, EPS)
            numerator = tl.dot(features, state_rest, numerator, input_precision=PRECISION)
            denominator += tl.sum(features * mean_rest[None, :], 1)
        result = (numerator / (denominator + EPS)[:, None]).to(out.dtype.element_ty)
        inside = (tokens < TOKENS)[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(out + start_of_head + tokens[:, None] * WIDTH + columns[None, :], result, mask=inside)
