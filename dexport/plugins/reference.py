"""What the references share: half precision is computed in float32 and rounded once, at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

HALF = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; other types as they are."""
    return x.float() if x.dtype in HALF else x


def restored(result: Tensor, like: Tensor) -> Tensor:
    """The result in the type of an input, contiguous, and never the input itself."""
    return result.to(like.dtype).contiguous()


def differentiable(op: CustomOpDef) -> None:
    """Give a custom operator the gradient of its reference, which runs once more in the backward pass."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in ctx.saved_tensors]
        remaining = iter(saved)
        with torch.enable_grad():
            output = op._init_fn(*(next(remaining) if value is None else value for value in ctx.inputs))
        grads = iter(torch.autograd.grad(output, saved, grad))
        return tuple(next(grads) if value is None else None for value in ctx.inputs)

    op.register_autograd(backward, setup_context=keep)
