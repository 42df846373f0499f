"""DexChannelAttention in Triton: pool, then matvec + sigmoid + scale.

Every gate needs the mean of every channel, so two kernels follow each other, except for images small enough
(``FUSED_LIMIT``) that one program holds one in registers and reads it once.
"""

# Triton: constants are upper case, parameters have no types Python knows.
# mypy: ignore-errors
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from dexport.plugins.triton_helpers import load_vector


@triton.jit
def dex_channel_attention_pool(
    x,
    pooled,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """pooled (B, C) float32 = mean of x (B, C, H*W) over pixels. Grid: (ceil(C / BLOCK_C), B)."""
    batch = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        pixels = start + tl.arange(0, BLOCK_P)
        inside = (channels < CHANNELS)[:, None] & (pixels < PIXELS)[None, :]
        tile = x + batch * (CHANNELS * PIXELS) + channels[:, None] * PIXELS + pixels[None, :]
        total += tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(pooled + batch * CHANNELS + channels, tl.sum(total, 1) / PIXELS, mask=channels < CHANNELS)


@triton.jit
def dex_channel_attention_scale(
    x,
    pooled,
    weight,
    bias,
    B,
    out,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """x * sigmoid(weight pooled + bias). Grid: (ceil(C / BLOCK_C), ceil(B / BLOCK_B), ceil(H*W /
    BLOCK_P)).

    One program: the gates of BLOCK_C channels of BLOCK_B images, so that a tile of the weight serves several
    images; then those channels' BLOCK_P pixels, image by image.
    """
    images = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    logits = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        sources = start + tl.arange(0, BLOCK_K)
        known = (images < B)[:, None] & (sources < CHANNELS)[None, :]
        means = tl.load(pooled + images[:, None] * CHANNELS + sources[None, :], mask=known, other=0.0)
        inside = (channels < CHANNELS)[:, None] & (sources < CHANNELS)[None, :]
        tile = tl.load(weight + channels[:, None] * CHANNELS + sources[None, :], mask=inside, other=0.0)
        logits = tl.dot(means.to(tile.dtype), tl.trans(tile), logits, input_precision=PRECISION)
    gates = tl.sigmoid(logits + load_vector(bias, channels, CHANNELS)[None, :])

    pixels = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (channels < CHANNELS)[:, None] & (pixels < PIXELS)[None, :]
    offsets = channels[:, None] * PIXELS + pixels[None, :]
    first = tl.program_id(1) * BLOCK_B
    for row in range(tl.minimum(BLOCK_B, B - first)):
        gate = tl.sum(tl.where((images == first + row)[:, None], gates, 0.0), 0)
        place = (first.to(tl.int64) + row) * (CHANNELS * PIXELS)
        values = tl.load(x + place + offsets, mask=inside, other=0.0).to(tl.float32) * gate[:, None]
        tl.store(out + place + offsets, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dex_channel_attention(
    x,
    weight,
    bias,
    out,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    PIXELS_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of it for one image, which is read once. Grid: (B,)."""
    place = tl.program_id(0).to(tl.int64) * (CHANNELS * PIXELS)
    channels = tl.arange(0, CHANNELS_PADDED)
    pixels = tl.arange(0, PIXELS_PADDED)
    inside = (channels < CHANNELS)[:, None] & (pixels < PIXELS)[None, :]
    offsets = channels[:, None] * PIXELS + pixels[None, :]
    image = tl.load(x + place + offsets, mask=inside, other=0.0)
    means = tl.sum(image.to(tl.float32), 1) / PIXELS
    logits = load_vector(bias, channels, CHANNELS)
    for start in range(0, CHANNELS_PADDED, BLOCK_K):
        sources = start + tl.arange(0, BLOCK_K)
        known = (channels < CHANNELS)[:, None] & (sources < CHANNELS)[None, :]
        tile = tl.load(weight + channels[:, None] * CHANNELS + sources[None, :], mask=known, other=0.0)
        logits += tl.sum(tile.to(tl.float32) * tl.gather(means, sources, 0)[None, :], 1)
    values = image.to(tl.float32) * tl.sigmoid(logits)[:, None]
    tl.store(out + place + offsets, values.to(out.dtype.element_ty), mask=inside)
