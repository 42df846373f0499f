"""DexTernaryMatMul in plain PyTorch, as a custom operator that exporters see as one node."""

from __future__ import annotations

import torch
from torch import Tensor

from dexport.plugins.reference import restored, widened
from dexport.plugins.ternary_matmul.packing import VALUES_PER_BYTE, unpack


@torch.library.custom_op("dexport::ternary_matmul", mutates_args=())
def ternary_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(x W^T) * scale.

    Args:
        x: (B, T, in).
        weight: W (out, in) in {-1, 0, 1} as uint8 (out / 4, in), see :mod:`dexport.plugins.ternary_matmul.packing`.
        scale: (1,), in the type of ``x``.

    Returns:
        (B, T, out) in the type of ``x``. Half precision is computed in float32.
    """
    return restored(widened(x) @ unpack(weight).to(widened(x).dtype).T * widened(scale), x)


@ternary_matmul.register_fake
def _fake(x: Tensor, weight: Tensor, _scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], VALUES_PER_BYTE * weight.shape[0])


def _keep(ctx, inputs, output):  # noqa: ARG001  the interface
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """Gradients of x and scale; packed weights have none."""
    x, weight, scale = ctx.saved_tensors
    values = unpack(weight).to(grad.dtype)
    return grad @ values * scale, None, (grad * (x @ values.T)).sum().reshape(1)


ternary_matmul.register_autograd(_backward, setup_context=_keep)
