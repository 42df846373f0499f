"""DexTMSA in Triton: attention with an online softmax; nothing of size heads x T x T is ever stored.

Two identities keep the time part out of the inner loop. It adds q . k_time to every logit of a query, which
softmax cancels; and since the weights sum to one, it adds v_time to the result.
"""

# Triton: constants are upper case, parameters have no types Python knows.
# mypy: ignore-errors
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from dexport.plugins.triton_helpers import load_tile, load_vector

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dex_tmsa(
    qkv,
    qkv_time,
    bias_table,
    out,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_REST: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head. Grid: (ceil(T / BLOCK_M), heads, B).

    A head of 72 is computed as 64 + 16 columns (HEAD_MAIN, HEAD_REST), not as 128. LOGIT_SCALE is
    head_dim^-0.5 * log2(e): the softmax works in powers of two.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    TABLE: tl.constexpr = (2 * WINDOW - 1) * (2 * WINDOW - 1)
    CENTRE: tl.constexpr = 2 * WINDOW * (WINDOW - 1)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    q_base = qkv + batch * (TOKENS * 3 * WIDTH) + head * HEAD_DIM
    k_base = q_base + WIDTH
    v_base = k_base + WIDTH
    q_time = qkv_time + batch * (3 * WIDTH) + head * HEAD_DIM
    v_time = q_time + 2 * WIDTH
    table = bias_table + head * TABLE
    dtype = qkv.dtype.element_ty

    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Distance in the table between a token and token 0: rows of the table are 2 * WINDOW - 1 long.
    query_place = (queries // WINDOW) * (2 * WINDOW - 1) + queries % WINDOW
    main = tl.arange(0, HEAD_MAIN)
    q_main = load_tile(q_base, queries, main, 3 * WIDTH, TOKENS, HEAD_DIM).to(tl.float32)
    q_main = (q_main + load_vector(q_time, main, HEAD_DIM)[None, :]).to(dtype)
    result_main = tl.zeros((BLOCK_M, HEAD_MAIN), tl.float32)
    if HEAD_REST > 0:
        rest = HEAD_MAIN + tl.arange(0, HEAD_REST)
        q_rest = load_tile(q_base, queries, rest, 3 * WIDTH, TOKENS, HEAD_DIM).to(tl.float32)
        q_rest = (q_rest + load_vector(q_time, rest, HEAD_DIM)[None, :]).to(dtype)
        result_rest = tl.zeros((BLOCK_M, HEAD_REST), tl.float32)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_place = (keys // WINDOW) * (2 * WINDOW - 1) + keys % WINDOW
        k_main = load_tile(k_base, keys, main, 3 * WIDTH, TOKENS, HEAD_DIM)
        logits = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
        if HEAD_REST > 0:
            k_rest = load_tile(k_base, keys, rest, 3 * WIDTH, TOKENS, HEAD_DIM)
            logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
        inside = (queries < TOKENS)[:, None] & (keys < TOKENS)[None, :]
        index = query_place[:, None] - key_place[None, :] + CENTRE
        bias = tl.load(table + index, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where((keys < TOKENS)[None, :], logits * LOGIT_SCALE + bias * LOG2_E, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
        weights = weights.to(dtype)
        v_main = load_tile(v_base, keys, main, 3 * WIDTH, TOKENS, HEAD_DIM)
        result_main = tl.dot(weights, v_main, result_main * shrink[:, None], input_precision=PRECISION)
        if HEAD_REST > 0:
            v_rest = load_tile(v_base, keys, rest, 3 * WIDTH, TOKENS, HEAD_DIM)
            result_rest = tl.dot(weights, v_rest, result_rest * shrink[:, None], input_precision=PRECISION)

    out_base = out + batch * (TOKENS * WIDTH) + head * HEAD_DIM
    place = out_base + queries[:, None] * WIDTH
    known = (queries < TOKENS)[:, None]
    result_main = result_main / total[:, None] + load_vector(v_time, main, HEAD_DIM)[None, :]
    tl.store(place + main[None, :], result_main.to(dtype), mask=known & (main < HEAD_DIM)[None, :])
    if HEAD_REST > 0:
        result_rest = result_rest / total[:, None] + load_vector(v_time, rest, HEAD_DIM)[None, :]
        tl.store(place + rest[None, :], result_rest.to(dtype), mask=known & (rest < HEAD_DIM)[None, :])
