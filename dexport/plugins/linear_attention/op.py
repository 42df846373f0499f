"""Definition of DexLinearAttention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dexport.plugins.op import Attribute, Dims, DType, Kernel, Op, Shape, Tensor, cdiv, split_head

Q, K, V, OUT = (Tensor(name, ("B", "T", "D")) for name in ("q", "k", "v", "out"))
STATE = Tensor("state", ("B", "heads", "head_dim", "head_dim"), "float32")
MEAN_K = Tensor("mean_k", ("B", "heads", "head_dim"), "float32")
EPS = 1e-6
"""Added to the ReLU features and to the denominator."""
LARGEST_FUSED_HEAD: Mapping[DType, int] = {"float16": 288, "bfloat16": 288, "float32": 128}
"""One program of the one-kernel form holds head_dim x BLOCK_V of the state in registers; beyond this it
spills."""


def measure(shapes: Sequence[Shape], attributes: Mapping[str, int]) -> Dims:
    heads = attributes["num_heads"]
    batch, tokens, width = shapes[0]
    return {
        "B": batch,
        "T": tokens,
        "D": width // heads * heads,
        "heads": heads,
        "head_dim": width // heads,
    }


def common_constants(dims: Dims) -> dict[str, int | float | str]:
    return {"TOKENS": dims["T"], "HEADS": dims["heads"], "HEAD_DIM": dims["head_dim"], "EPS": EPS}


def state_precision(dtype: DType) -> str:
    return "tf32x3" if dtype == "float32" else "tf32"


def state_constants(dims: Dims, dtype: DType) -> Mapping[str, int | float | str]:
    return {**common_constants(dims), "PRECISION": state_precision(dtype)}


def fused_constants(dims: Dims, dtype: DType) -> Mapping[str, int | float | str]:
    main, rest = split_head(dims["head_dim"])
    return {
        **common_constants(dims),
        "HEAD_MAIN": main,
        "HEAD_REST": rest,
        "PRECISION": state_precision(dtype),
    }


STATE_KERNEL = Kernel(
    name="dex_linear_attention_state",
    module="dexport.plugins.linear_attention.kernel",
    inputs=(K, V),
    outputs=(STATE, MEAN_K),
    constants=state_constants,
    grid=lambda dims, blocks: (
        cdiv(dims["head_dim"], blocks["BLOCK_K"]),
        cdiv(dims["head_dim"], blocks["BLOCK_V"]),
        dims["B"] * dims["heads"],
    ),
)
APPLY_KERNEL = Kernel(
    name="dex_linear_attention_apply",
    module="dexport.plugins.linear_attention.kernel",
    inputs=(Q, STATE, MEAN_K),
    outputs=(OUT,),
    constants=state_constants,
    grid=lambda dims, blocks: (
        cdiv(dims["T"], blocks["BLOCK_T"]),
        cdiv(dims["head_dim"], blocks["BLOCK_V"]),
        dims["B"] * dims["heads"],
    ),
)
ONE_KERNEL = Kernel(
    name="dex_linear_attention",
    module="dexport.plugins.linear_attention.kernel",
    inputs=(Q, K, V),
    outputs=(OUT,),
    constants=fused_constants,
    grid=lambda dims, blocks: (cdiv(dims["head_dim"], blocks["BLOCK_V"]), dims["B"] * dims["heads"], 1),
    fits=lambda dims, dtype: dims["head_dim"] <= LARGEST_FUSED_HEAD[dtype],
)

LINEAR_ATTENTION = Op(
    name="DexLinearAttention",
    summary="linear attention with ReLU features, mean normaliser and N^-1/2 factors",
    inputs=(Q, K, V),
    outputs=(OUT,),
    attributes=(Attribute("num_heads", "number of heads"),),
    measure=measure,
    reference="dexport.plugins.linear_attention.reference:linear_attention",
    body="dexport.plugins.linear_attention.function:body",
    kernels=(STATE_KERNEL, APPLY_KERNEL),
    plugin=ONE_KERNEL,
)
