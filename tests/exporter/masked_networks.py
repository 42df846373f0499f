"""Attention under masks, as people write them: infinite or huge numbers, in buffers, made in ``forward``, or stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.exporter.recipes.recipe import Recipe
from tests.exporter.networks import CHANNELS, CLASSES, SIDE, recipe

TOKENS = SIDE * SIDE
WIDTH = 16
LOWEST = torch.finfo(torch.float32).min
VALUES = {"inf": -math.inf, "1e9": -1e9, "lowest": LOWEST, "1e4": -1e4}


def causal(value: float) -> Tensor:
    return torch.full((TOKENS, TOKENS), value, device="cpu").triu(1)


def added_buffer(self: Any, scores: Tensor) -> Tensor:
    return (scores + self.mask).softmax(-1)


def stored_buffer(self: Any, scores: Tensor) -> Tensor:
    return (scores + self.stored).softmax(-1)


def filled(self: Any, scores: Tensor) -> Tensor:
    return scores.masked_fill(self.hidden, self.value).softmax(-1)


def chosen(self: Any, scores: Tensor) -> Tensor:
    return torch.where(self.hidden, self.value, scores).softmax(-1)


def multiplied(self: Any, scores: Tensor) -> Tensor:
    if math.isinf(self.value):
        return added_buffer(self, scores)  # 0 times infinity is NaN
    return (scores + (1 - self.seen.float()) * self.value).softmax(-1)


def made_in_forward(self: Any, scores: Tensor) -> Tensor:
    mask = torch.full((TOKENS, TOKENS), self.value, device=scores.device).triu(1)
    return (scores + mask).softmax(-1)


def hidden_row(self: Any, scores: Tensor) -> Tensor:
    """A row that is masked as a whole: uniform under numbers; NaN under infinity, which the network replaces."""
    return (scores + self.row).softmax(-1).nan_to_num(0.0)


WAYS = {f.__name__: f for f in (added_buffer, stored_buffer, filled, chosen, multiplied, made_in_forward, hidden_row)}
SDPA = "sdpa"


class Masked(nn.Module):
    """x (B, 3, 8, 8), t (B,), y (B,) -> (B, 3, 8, 8)."""

    def __init__(self, way: str, value: str) -> None:
        super().__init__()
        self.way, self.value = way, VALUES[value]
        self.first = nn.Linear(CHANNELS, WIDTH)
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.last = nn.Linear(WIDTH, CHANNELS)
        mask = causal(self.value)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("hidden", mask < 0, persistent=False)
        self.register_buffer("seen", mask >= 0, persistent=False)
        row = mask.clone()
        row[5] = self.value
        self.register_buffer("row", row, persistent=False)
        if way == "stored_buffer":
            self.register_buffer("stored", mask)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.first(x.flatten(2).transpose(1, 2)) + (self.label(y) * t[:, None]).unsqueeze(1)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        if self.way == SDPA:
            heads = (part.unsqueeze(1) for part in (q, k, v))
            tokens = F.scaled_dot_product_attention(*heads, attn_mask=self.mask).squeeze(1)
        else:
            tokens = WAYS[self.way](self, q @ k.transpose(1, 2) / math.sqrt(WIDTH)) @ v
        return self.last(tokens).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def masked(way: str, value: str, **changes: Any) -> Recipe:
    config: Mapping[str, Any] = {"way": way, "value": value}
    constructor: Callable[..., nn.Module] = Masked
    return recipe(constructor, config=config, **changes)
