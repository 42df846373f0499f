"""Definition of DexTMSA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dexport.plugins.op import Attribute, Dims, DType, Kernel, Op, Shape, Tensor, cdiv, split_head

INPUTS = (
    Tensor("qkv", ("B", "T", "3D")),
    Tensor("qkv_time", ("B", "3D")),
    Tensor("bias_table", ("heads", "table")),
)
OUTPUTS = (Tensor("out", ("B", "T", "D")),)


def measure(shapes: Sequence[Shape], attributes: Mapping[str, int]) -> Dims:
    heads, window = attributes["num_heads"], attributes["window"]
    width = shapes[0][2] // 3
    return {
        "B": shapes[0][0],
        "T": window * window,
        "D": width // heads * heads,
        "3D": 3 * (width // heads * heads),
        "heads": heads,
        "head_dim": width // heads,
        "window": window,
        "table": (2 * window - 1) ** 2,
    }


def constants(dims: Dims, dtype: DType) -> Mapping[str, int | float | str]:
    main, rest = split_head(dims["head_dim"])
    return {
        "TOKENS": dims["T"],
        "WINDOW": dims["window"],
        "HEADS": dims["heads"],
        "HEAD_DIM": dims["head_dim"],
        "HEAD_MAIN": main,
        "HEAD_REST": rest,
        "LOGIT_SCALE": dims["head_dim"] ** -0.5 * math.log2(math.e),
        "PRECISION": "tf32x3" if dtype == "float32" else "tf32",
    }


KERNEL = Kernel(
    name="dex_tmsa",
    module="dexport.plugins.tmsa.kernel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    constants=constants,
    grid=lambda dims, blocks: (cdiv(dims["T"], blocks["BLOCK_M"]), dims["heads"], dims["B"]),
)

TMSA = Op(
    name="DexTMSA",
    summary="self-attention whose q, k, v have a time part, with a relative position bias over one window",
    inputs=INPUTS,
    outputs=OUTPUTS,
    attributes=(
        Attribute("num_heads", "number of heads"),
        Attribute("window", "side of the token grid; T = window * window"),
    ),
    measure=measure,
    reference="dexport.plugins.tmsa.reference:tmsa",
    body="dexport.plugins.tmsa.function:body",
    kernels=(KERNEL,),
    plugin=KERNEL,
)
