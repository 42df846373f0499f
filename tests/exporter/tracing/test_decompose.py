"""Programs that torch need not trace again give the graph of those that it does; the others it traces again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import BATCH, Signature, TensorSpec
from dexport.exporter.variant import Variant, resolve
from tests.exporter.tracing.test_repeats import both_ways

NETWORKS = {
    # what a network does -> whether torch traces it again
    "views, chunks and casts": False,
    "several symbolic sizes": True,
    "composite": True,
    "in place": True,
    "without gradients": True,
}


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.linear(x)
        match self.kind:
            case "views, chunks and casts":
                first, *_, last = x.chunk(4, dim=2)
                x = x + torch.cat([first, last, x.chunk(2, dim=-1)[1][:, :, :2]], dim=2)
                x = x.to(torch.float32) + x.to(torch.float64).to(torch.float32) * y.to(x.dtype).reshape(-1, 1, 1)
                x = x.transpose(1, 2).flatten(1).unflatten(1, (3, 8)).permute(2, 0, 1).flatten(1, 2)
                x = x.unflatten(1, (-1, 3)).permute(1, 2, 0).reshape(-1, 4, 6)
            case "several symbolic sizes":
                x = x + (x.flatten(1) @ x.flatten(1).T).unsqueeze(-1).expand(-1, -1, 3).flatten(1).mean()
            case "composite":
                x = torch.outer(t, t).mean() * x.square()
            case "in place":
                x = x.clone()
                x[:, 0].add_(1)
            case "without gradients":
                with torch.no_grad():
                    x = x + x.flatten(1).sum(1).reshape(-1, 1, 1)
        return x + t.reshape(-1, 1, 1) + y.reshape(-1, 1, 1)


def variant_of(kind: str) -> Variant:
    def signature(_config: Any, _latent: Any) -> Signature:
        inputs = (
            TensorSpec("x", "float32", (BATCH, 4, 6)),
            TensorSpec("t", "float32", (BATCH,)),
            TensorSpec("y", "int64", (BATCH,)),
        )
        return Signature(inputs, (TensorSpec("out", "float32", (BATCH, 4, 6)),))

    return resolve(replace(find_recipe("dico-s"), constructor=Network, config={"kind": kind}, signature=signature))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_graph_is_that_of_the_second_trace(kind: str, traced_again: list[None]) -> None:
    fast, full = both_ways(variant_of(kind))
    assert fast == full
    assert len(traced_again) == (2 if NETWORKS[kind] else 1)
