"""Run an op in each of its forms: ONNX function in ONNX Runtime, Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from dexport.plugins.compile import parameters
from dexport.plugins.functions import MINIMUM_OPSET, function_protos
from dexport.plugins.op import DOMAIN, DType, Kernel, Op, Tile, resolve
from dexport.plugins.tiles import preferred

ONNX_TYPES = {torch.float32: 1, torch.uint8: 2, torch.float16: 10, torch.bfloat16: 16}
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest :func:`error` between two forms of an op."""


def reference(op: Op, inputs: Sequence[Tensor], attributes: Mapping[str, int]) -> Tensor:
    return resolve(op.reference)(*inputs, **attributes)


def model_of(op: Op, inputs: Sequence[Tensor], attributes: Mapping[str, int], wide: bool) -> onnx.ModelProto:
    """One node of the op, with a symbolic batch."""
    dims = op.dims([tuple(x.shape) for x in inputs], attributes)

    def info(name: str, dtype: torch.dtype, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
        sizes = ["B" if dim == "B" else dims[dim] if isinstance(dim, str) else dim for dim in shape]
        return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], sizes)

    out = op.outputs[0]
    out_dtype = getattr(torch, out.dtype) if out.dtype else inputs[0].dtype
    graph = helper.make_graph(
        [helper.make_node(op.name, [t.name for t in op.inputs], [out.name], domain=DOMAIN, **attributes)],
        "one_op",
        [info(t.name, x.dtype, t.shape) for t, x in zip(op.inputs, inputs, strict=True)],
        [info(out.name, out_dtype, out.shape)],
    )
    return helper.make_model(
        graph,
        functions=function_protos(op, wide=wide),
        opset_imports=[helper.make_opsetid("", MINIMUM_OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


def in_onnxruntime(op: Op, inputs: Sequence[Tensor], attributes: Mapping[str, int], wide: bool = False) -> Tensor:
    model = model_of(op, inputs, attributes, wide)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {t.name: x.numpy() for t, x in zip(op.inputs, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def in_interpreter(
    op: Op,
    kernels: Sequence[Kernel],
    inputs: Sequence[Tensor],
    attributes: Mapping[str, int],
    blocks: Mapping[str, int] | None = None,
) -> Tensor:
    """Run the kernels with the arguments, constants and grid that a launch on a GPU has."""
    dtype: DType = str(inputs[0].dtype).removeprefix("torch.")  # type: ignore[assignment]
    dims = op.dims([tuple(x.shape) for x in inputs], attributes)
    tensors = {t.name: x.contiguous() for t, x in zip(op.inputs, inputs, strict=True)}
    for kernel in kernels:
        for out in kernel.outputs:
            out_dtype = getattr(torch, out.dtype) if out.dtype else inputs[0].dtype
            # What a kernel forgets to write must show.
            tensors[out.name] = torch.full(out.dims(dims), float("nan"), dtype=out_dtype)
        tile = preferred(kernel, "sm90", dtype) if blocks is None else Tile(blocks)
        arguments = [tensors[name] if kind == "tensor" else dims[name] for name, kind in parameters(kernel)]
        function = kernel.function()
        function[kernel.grid(dims, tile.blocks)](*arguments, **kernel.constants(dims, dtype), **tile.blocks)
    return tensors[op.outputs[0].name]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude; infinite when something is not
    finite."""
    if not actual.isfinite().all():
        return float("inf")
    scale = max(float(expected.double().abs().max()), 1e-30)
    return float((actual.double() - expected.double()).abs().max()) / scale
