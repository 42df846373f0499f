"""Faults that a port of a network may have, planted in one that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs import time_dependent

Plant = Callable[[nn.Module, pytest.MonkeyPatch], None]


def other_gelu(_: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """The tanh approximation for the exact function, and the other way round."""
    gelu = F.gelu

    def swapped(x: Tensor, approximate: str = "none") -> Tensor:
        return gelu(x, approximate="tanh" if approximate == "none" else "none")

    patch.setattr(F, "gelu", swapped)


def ten_times_the_epsilon(module: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """1e-5, which is PyTorch's default, for the 1e-6 of most networks."""
    for part in module.modules():
        if isinstance(getattr(part, "eps", None), float):
            part.eps *= 10
    patch.setattr(time_dependent, "LAYER_NORM_EPS", 10 * time_dependent.LAYER_NORM_EPS)


def other_order_of_chunks(_: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """Shift for scale in adaLN, value for gate, query for key."""
    chunk = torch.Tensor.chunk

    def swapped(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        first, second, *rest = chunk(x, *args, **kwargs)
        return second, first, *rest

    patch.setattr(torch.Tensor, "chunk", swapped)
