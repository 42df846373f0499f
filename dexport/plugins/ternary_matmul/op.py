"""Definition of DexTernaryMatMul."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dexport.plugins.op import Dims, DType, Kernel, Op, Shape, Tensor, cdiv

X = Tensor("x", ("B", "T", "K"))
WEIGHT = Tensor("weight", ("quarter", "K"), "uint8")
SCALE = Tensor("scale", (1,))
OUT = Tensor("out", ("B", "T", "N"))


def measure(shapes: Sequence[Shape], _attributes: Mapping[str, int]) -> Dims:
    batch, tokens, width = shapes[0]
    quarter = shapes[1][0]
    return {"B": batch, "T": tokens, "K": width, "quarter": quarter, "N": 4 * quarter}


def constants(dims: Dims, dtype: DType) -> Mapping[str, int | float | str]:
    return {
        "TOKENS": dims["T"],
        "WIDTH": dims["K"],
        "QUARTER": dims["quarter"],
        # The weights are exact in TF32; three products keep the activations' float32.
        "PRECISION": "tf32x3" if dtype == "float32" else "tf32",
    }


KERNEL = Kernel(
    name="dex_ternary_matmul",
    module="dexport.plugins.ternary_matmul.kernel",
    inputs=(X, WEIGHT, SCALE),
    scalars=("B",),
    outputs=(OUT,),
    constants=constants,
    grid=lambda dims, blocks: (
        cdiv(dims["B"] * dims["T"], blocks["BLOCK_M"]),
        cdiv(dims["quarter"], blocks["BLOCK_N"]),
        1,
    ),
)

TERNARY_MATMUL = Op(
    name="DexTernaryMatMul",
    summary="x times ternary weights packed four to a byte, times one scale",
    inputs=(X, WEIGHT, SCALE),
    outputs=(OUT,),
    attributes=(),
    measure=measure,
    reference="dexport.plugins.ternary_matmul.reference:ternary_matmul",
    body="dexport.plugins.ternary_matmul.function:body",
    kernels=(KERNEL,),
    plugin=KERNEL,
)
