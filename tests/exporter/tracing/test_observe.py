"""Blocks whose state differs from call to call, wherever that state is kept, get the graph of a full trace."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dexport.exporter.tracing.repeats import Body
from tests.exporter.tracing.test_repeats import both_ways, count_full_traces, variant_of

BLOCKS_OF_A_NETWORK = 3
SETTINGS: dict[str, float] = {}
"""A global that networks set and blocks read."""


class Store:
    """What the blocks of a network share."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.count = 0
        self.random = random.Random(0)


@dataclass
class Call:
    network: Network
    index: int


class Block(nn.Module):
    """Called by its network, which prepares each call and follows it up."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.LeakyReLU(0.5)
        self.scale = 1.0
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) * self.scale + self.offset

    def prepare(self, call: Call) -> None:
        """What the parent does before the call."""

    def call(self, _call: Call, x: Tensor) -> Tensor:
        return self(x)

    def follow_up(self, _call: Call, x: Tensor) -> Tensor:
        """What the parent does after it."""
        return x


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        block = BLOCKS[kind]
        self.blocks = nn.ModuleList(block() for _ in range(BLOCKS_OF_A_NETWORK))
        self.start = nn.Parameter(torch.zeros(4))
        self.store = Store()
        for own in self.blocks:
            own.__dict__["store"] = self.store  # one object for all of them

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = x + self.start
        for index, block in enumerate(self.blocks):
            block.prepare(Call(self, index))
            x = block.follow_up(Call(self, index), block.call(Call(self, index), x))
        return x + t.reshape(-1, 1, 1) + y.reshape(-1, 1, 1)


class Attribute(Block):
    def prepare(self, call: Call) -> None:
        self.scale = float(call.index)


class AttributeOfAChild(Block):
    def prepare(self, call: Call) -> None:
        self.act.negative_slope = 0.1 * call.index


class AttributeOfTheClass(Block):
    def prepare(self, call: Call) -> None:
        type(self).factor = float(call.index)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Global(Block):
    def prepare(self, call: Call) -> None:
        SETTINGS["scale"] = float(call.index)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SETTINGS["scale"]


class Counter(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.store.count += 1
        return super().forward(x) * self.store.count


class Branch(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.store.count += 1
        return super().forward(x) if self.store.count % 2 else self.linear(x)


class Random(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.store.random.random()


class Training(Block):
    def prepare(self, call: Call) -> None:
        self.training = bool(call.index % 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.training else 3.0)


class FillsAList(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.store.tensors.append(x)
        return x + torch.stack(self.store.tensors).sum(0)


class SetsOnce(Block):
    """All use what the first one made."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.store.named.setdefault("x", x)


class ReadByTheParent(Block):
    """In each of them, a value is not the one of the same name in the first."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["kept"] = self.linear(x)
        return super().forward(x)

    def follow_up(self, call: Call, x: Tensor) -> Tensor:
        return x + self.__dict__["kept"] * call.index


class ArgumentReadByTheParent(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["kept"] = x
        return super().forward(x)

    def follow_up(self, call: Call, x: Tensor) -> Tensor:
        return x + self.__dict__["kept"] * call.index


class Context(Block):
    """A tensor that the parent leaves at the block."""

    def prepare(self, call: Call) -> None:
        self.__dict__["context"] = self.store.tensors[-1] if call.index else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.__dict__["context"]

    def follow_up(self, _call: Call, x: Tensor) -> Tensor:
        self.store.tensors.append(x)
        return x


class ListArgument(Block):
    def call(self, _call: Call, x: Tensor) -> Tensor:
        return self(x, self.store.tensors)

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        assert seen is not None
        x = super().forward(x)
        seen.append(x)
        return x + sum(seen)


class DictArgument(Block):
    def call(self, _call: Call, x: Tensor) -> Tensor:
        cache = {"x": x}
        return self(x, cache) + cache["x"]

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
        assert cache is not None
        cache["x"] = self.linear(x)
        return super().forward(x)


class WeightsOfAnother(Block):
    def call(self, call: Call, x: Tensor) -> Tensor:
        return torch.func.functional_call(self, dict(call.network.blocks[0].named_parameters()), (x,))


class WeightsThatAreComputed(Block):
    def call(self, call: Call, x: Tensor) -> Tensor:
        return torch.func.functional_call(self, {"linear.weight": self.linear.weight * call.index}, (x,))


class WeightsUsedOutside(Block):
    def follow_up(self, call: Call, x: Tensor) -> Tensor:
        return x + functional.linear(x, call.network.blocks[BLOCKS_OF_A_NETWORK - 1 - call.index].linear.weight)


class WritesABuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.offset.add_(1)
        return super().forward(x)


class ReplacesABuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.offset = self.offset + 1
        return super().forward(x)


class WithoutGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.store.count += 1
        with torch.set_grad_enabled(self.store.count % 2 == 0):
            return super().forward(x)


class TwoViews(Block):
    """The same tensor twice is another case than two tensors."""

    def call(self, call: Call, x: Tensor) -> Tensor:
        return self(x, x) if call.index % 2 else self(x, x + 1)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return super().forward(x) if x is z else super().forward(x) + z


class Sibling(Block):
    """One block calls the next one."""

    def prepare(self, call: Call) -> None:
        self.__dict__["next"] = call.network.blocks[(call.index + 1) % BLOCKS_OF_A_NETWORK]

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        x = super().forward(x)
        return self.__dict__["next"](x, 0) if depth else x


class Regular(Block):
    """Uses whatever is the same in all of them."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[0], len(x[0])
        first, *_, last = x.unbind(1)
        rows = list(x.transpose(0, 1))
        x = x + torch.stack(rows, 1).reshape(batch, length, -1)
        best, where = x.max(dim=-1, keepdim=True)
        x = functional.layer_norm(x, x.shape[-1:]) * x[0].shape.numel()
        x[..., :1].size()
        noise = torch.zeros(batch, 1, 4, dtype=x.dtype, device=x.device)
        x = torch.where(x > first[:, None], x, best) + last[:, None] + noise + where
        x = functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return super().forward(x)


class Autocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.store.count += 1
        with torch.autocast("cpu", enabled=self.store.count % 2 == 0):
            return self.linear(x).float()


class CountsOnly(Block):
    """State that decides nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.store.count += 1
        self.store.shape = tuple(x.shape)
        return super().forward(x)


SHARED = {"regular": Regular, "counts only": CountsOnly}
"""Traced once."""
APART = {"attribute": Attribute, "attribute of a child": AttributeOfAChild}
"""Each block is traced by itself: that they differ is seen before they run."""
BLOCKS = {
    **SHARED,
    **APART,
    "attribute of the class": AttributeOfTheClass,
    "global": Global,
    "counter": Counter,
    "branch": Branch,
    "random": Random,
    "training": Training,
    "fills a list": FillsAList,
    "sets once": SetsOnce,
    "read by the parent": ReadByTheParent,
    "argument read by the parent": ArgumentReadByTheParent,
    "context": Context,
    "list argument": ListArgument,
    "dict argument": DictArgument,
    "weights of another": WeightsOfAnother,
    "weights that are computed": WeightsThatAreComputed,
    "weights used outside": WeightsUsedOutside,
    "writes a buffer": WritesABuffer,
    "replaces a buffer": ReplacesABuffer,
    "autocast": Autocast,
    "without gradients": WithoutGradients,
    "two views": TwoViews,
    "sibling": Sibling,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_state_is_seen_wherever_it_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = count_full_traces(monkeypatch)
    copies: list[str] = []
    copy = Body.copy
    monkeypatch.setattr(Body, "copy", lambda body, *place: copies.append(body.path) or copy(body, *place))
    once, every = both_ways(variant_of(Network, kind=kind))
    assert once == every
    if kind in SHARED | APART:
        assert given_up == []
        assert len(copies) == (BLOCKS_OF_A_NETWORK - 1 if kind in SHARED else 0)
