"""Definitions of DexChannelAttention and of its two parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dexport.plugins.op import Dims, DType, Kernel, Op, Shape, Tensor, cdiv

X, OUT = Tensor("x", ("B", "C", "H", "W")), Tensor("out", ("B", "C", "H", "W"))
POOLED = Tensor("pooled", ("B", "C"), "float32")
WEIGHT, BIAS = Tensor("weight", ("C", "C", 1, 1)), Tensor("bias", ("C",))
FUSED_LIMIT: Mapping[DType, int] = {"float16": 32768, "bfloat16": 32768, "float32": 16384}
"""Elements of one image, padded to powers of two, that the fused kernel keeps in registers."""


def measure(shapes: Sequence[Shape], _attributes: Mapping[str, int]) -> Dims:
    batch, channels, height, width = shapes[0]
    return {"B": batch, "C": channels, "H": height, "W": width}


def next_power_of_two(value: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (value - 1).bit_length())


def pool_constants(dims: Dims, _dtype: DType) -> Mapping[str, int | float | str]:
    return {"CHANNELS": dims["C"], "PIXELS": dims["H"] * dims["W"]}


def scale_constants(dims: Dims, dtype: DType) -> Mapping[str, int | float | str]:
    return {**pool_constants(dims, dtype), "PRECISION": "tf32x3" if dtype == "float32" else "tf32"}


def fused_constants(dims: Dims, dtype: DType) -> Mapping[str, int | float | str]:
    return {
        **pool_constants(dims, dtype),
        "CHANNELS_PADDED": next_power_of_two(dims["C"], 32),
        "PIXELS_PADDED": next_power_of_two(dims["H"] * dims["W"]),
    }


POOL_KERNEL = Kernel(
    name="dex_channel_attention_pool",
    module="dexport.plugins.channel_attention.kernel",
    inputs=(X,),
    outputs=(POOLED,),
    constants=pool_constants,
    grid=lambda dims, blocks: (cdiv(dims["C"], blocks["BLOCK_C"]), dims["B"], 1),
)
SCALE_KERNEL = Kernel(
    name="dex_channel_attention_scale",
    module="dexport.plugins.channel_attention.kernel",
    inputs=(X, POOLED, WEIGHT, BIAS),
    scalars=("B",),
    outputs=(OUT,),
    constants=scale_constants,
    grid=lambda dims, blocks: (
        cdiv(dims["C"], blocks["BLOCK_C"]),
        cdiv(dims["B"], blocks["BLOCK_B"]),
        cdiv(dims["H"] * dims["W"], blocks["BLOCK_P"]),
    ),
)
FUSED_KERNEL = Kernel(
    name="dex_channel_attention",
    module="dexport.plugins.channel_attention.kernel",
    inputs=(X, WEIGHT, BIAS),
    outputs=(OUT,),
    constants=fused_constants,
    grid=lambda dims, _blocks: (dims["B"], 1, 1),
    fits=lambda dims, dtype: (
        next_power_of_two(dims["C"], 32) * next_power_of_two(dims["H"] * dims["W"]) <= FUSED_LIMIT[dtype]
    ),
)

POOL = Op(
    name="DexChannelAttentionPool",
    summary="float32 mean over pixels",
    inputs=(X,),
    outputs=(POOLED,),
    attributes=(),
    measure=measure,
    reference="dexport.plugins.channel_attention.reference:pool",
    body="dexport.plugins.channel_attention.function:pool_body",
    kernels=(POOL_KERNEL,),
    plugin=POOL_KERNEL,
)
SCALE = Op(
    name="DexChannelAttentionScale",
    summary="x times the sigmoid of a 1x1 convolution of its means",
    inputs=(X, POOLED, WEIGHT, BIAS),
    outputs=(OUT,),
    attributes=(),
    measure=measure,
    reference="dexport.plugins.channel_attention.reference:scale",
    body="dexport.plugins.channel_attention.function:scale_body",
    kernels=(SCALE_KERNEL,),
    plugin=SCALE_KERNEL,
)
CHANNEL_ATTENTION = Op(
    name="DexChannelAttention",
    summary="x * sigmoid(conv1x1(mean over pixels of x))",
    inputs=(X, WEIGHT, BIAS),
    outputs=(OUT,),
    attributes=(),
    measure=measure,
    reference="dexport.plugins.channel_attention.reference:channel_attention",
    body="dexport.plugins.channel_attention.function:body",
    kernels=(POOL_KERNEL, SCALE_KERNEL),
    fused=FUSED_KERNEL,
    parts=(POOL.name, SCALE.name),
)
