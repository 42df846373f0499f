"""What the references share: half precision is computed in float32 and rounded once, at the end."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; other types as they are."""
    return x.float() if x.dtype in HALF else x


def restored(result: Tensor, like: Tensor) -> Tensor:
    """The result in the type of an input, contiguous, and never the input itself."""
    return result.to(like.dtype).contiguous()
