"""A network with two graphs, and the system of two such networks that the program `average` runs."""

from collections.abc import Mapping
from typing import Any

import torch
from average_program import FULL, REUSE, Average
from torch import Tensor, nn

from dexport.contract import LABEL, MEMORY, PREDICTION, STATE, TIME, Condition
from dexport.exporter.recipes.recipe import BATCH, GraphRecipe, Islands, Recipe, Signature, TensorSpec
from dexport.exporter.recipes.system import System

SIDE = 8


# --8<-- [start:network]
class Trunk(nn.Module):
    """Most of the arithmetic, in `features`, and a small rest that can go on from it."""

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(num_classes, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width + 1, 1, 3, padding=1)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = self.time(t[:, None]) + self.label(y)
        return self.middle(nn.functional.silu(self.first(x) + condition[:, :, None, None]))

    def rest(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return self.last(torch.cat([nn.functional.silu(features), x * t[:, None, None, None]], dim=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.rest(x, t, self.features(x, t, y))


# --8<-- [end:network]
# --8<-- [start:graphs]
class Full(nn.Module):
    def __init__(self, network: Trunk) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(x, t, y)
        return self.network.rest(x, t, features), features


class Reuse(nn.Module):
    def __init__(self, network: Trunk) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return self.network.rest(x, t, features)


def ports(config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, TensorSpec]:
    features = (BATCH, config.get("width", 16), *size)
    return {
        "x": TensorSpec("x", "float32", (BATCH, 1, *size), role=STATE),
        "t": TensorSpec("t", "float32", (BATCH,), "stratified", 0.0, 1.0, role=TIME),
        "y": TensorSpec("y", "int64", (BATCH,), "integers", 0, config.get("num_classes", 10) - 1, role=LABEL),
        "features": TensorSpec("features", "float32", features, role=MEMORY),
        "out": TensorSpec("out", "float32", (BATCH, 1, *size), role=PREDICTION),
    }


def signature(*inputs: str, outputs: tuple[str, ...] = ("out",)) -> Any:
    def of(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
        known = ports(config, size)
        return Signature(tuple(known[name] for name in inputs), tuple(known[name] for name in outputs))

    return of


NETWORK = Recipe(
    name="trunk",
    family="Trunk",
    summary="a small network whose features can be reused",
    source="examples/average",
    constructor=Trunk,
    config={"width": 16, "num_classes": 10},
    signature=signature("x", "t", "y"),
    graphs={
        FULL: GraphRecipe(signature("x", "t", "y", outputs=("out", "features")), lambda network, _: Full(network)),
        REUSE: GraphRecipe(signature("x", "t", "features"), lambda network, _: Reuse(network)),
    },
    exported=(FULL, REUSE),
    latent=(SIDE, SIDE),
    pixels_per_latent=1,
    islands=Islands(modules=("time",)),
)
# --8<-- [end:graphs]
# --8<-- [start:system]
PAIR = System(
    name="average-of-two",
    family="Trunk",
    summary="the mean of two networks at every step",
    source="examples/average",
    roles={"denoiser": (NETWORK, NETWORK)},
    program=lambda networks: Average(
        condition=Condition("class", networks["denoiser"][0].config["num_classes"]),
    ),
)

RECIPES = (NETWORK, PAIR)
# --8<-- [end:system]
