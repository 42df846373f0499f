"""Small networks of a user's own, written as people write them, and their recipe."""
# ruff: noqa: ARG001, ARG005, T201 - a network has its arguments, whatever it does with them

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dexport.exporter.recipes.recipe import BATCH, Guidance, Recipe, Sampling, Signature, TensorSpec

CHANNELS, SIDE, CLASSES = 3, 8, 10


class Network(nn.Module):
    """x (B, 3, 8, 8), t (B,), y (B,) -> (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.label = nn.Embedding(CLASSES + 1, CHANNELS)

    def head(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + self.label(y)[:, :, None, None] * t[:, None, None, None]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.head(x, t, y)


def network(forward: Callable[..., Any]) -> type[Network]:
    """A network with another ``forward``."""
    return type(forward.__name__, (Network,), {"forward": forward})


def signature(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
    image = (BATCH, CHANNELS, *size)
    return Signature(
        (
            TensorSpec("x", "float32", image),
            TensorSpec("t", "float32", (BATCH,), "stratified", 0.0, 1.0),
            TensorSpec("y", "int64", (BATCH,), "integers", 0, CLASSES - 1),
        ),
        (TensorSpec("out", "float32", image),),
    )


def recipe(constructor: Callable[..., Any] = Network, **changes: Any) -> Recipe:
    return Recipe(
        **{
            "name": "mine",
            "family": "Mine",
            "summary": "",
            "source": "a test",
            "constructor": constructor,
            "config": {},
            "signature": signature,
            "latent": (SIDE, SIDE),
            "pixels_per_latent": 1,
            "sampling": Sampling("rectified flow", "velocity", "flow", 4, 1.0, "none"),
            "guidance": Guidance("all channels", 2.0, lambda config: CLASSES),
            **changes,
        }
    )


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As transformers and diffusers have it: a mapping, a dataclass, and neither a tuple nor known to torch."""

    sample: Tensor
    extra: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class Plain:
    out: Tensor


Named = namedtuple("Named", "features out")

RETURNS: dict[str, Callable[..., Any]] = {
    "dict": lambda self, x, t, y: {"out": self.head(x, t, y)},
    "dict with more": lambda self, x, t, y: {"features": x * 2, "out": self.head(x, t, y), "loss": None},
    "dict with another name": lambda self, x, t, y: {"sample": self.head(x, t, y)},
    "tuple": lambda self, x, t, y: (self.head(x, t, y),),
    "tuple with None": lambda self, x, t, y: (self.head(x, t, y), None),
    "list": lambda self, x, t, y: [self.head(x, t, y)],
    "named tuple": lambda self, x, t, y: Named(x, self.head(x, t, y)),
    "dataclass": lambda self, x, t, y: Plain(self.head(x, t, y)),
    "model output": lambda self, x, t, y: ModelOutput(self.head(x, t, y)),
}
"""Ways to return the one output that is declared."""


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # a line of a module inside
            return x
        return -x


class Nested(Network):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Identity(), nn.Sequential(Positive())])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.head(self.stages[1](x), t, y)


class Upsample(nn.Module):
    """Diffusers' Upsample2D guards against a fault of PyTorch for batches from 64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] >= 64:
            x = x.contiguous()
        return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


class UNet(Network):
    """UNet2DModel's ways: times that may be numbers, a mapping as the result, a guard on the batch."""

    def __init__(self, guarded: bool = True) -> None:
        super().__init__()
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.up = Upsample() if guarded else nn.Upsample(scale_factor=2.0)

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        timesteps = timestep
        if not torch.is_tensor(timesteps):
            timesteps = torch.tensor([timesteps], dtype=torch.long, device=sample.device)
        elif torch.is_tensor(timesteps) and len(timesteps.shape) == 0:
            timesteps = timesteps[None].to(sample.device)
        timesteps = timesteps * torch.ones(sample.shape[0], dtype=timesteps.dtype, device=timesteps.device)
        sample = self.head(self.up(self.down(sample)), timesteps, class_labels)
        return ModelOutput(sample=sample) if return_dict else (sample,)


def on_value(self, x, t, y):
    if x.sum() > 0:  # the line
        return self.head(x, t, y)
    return self.head(-x, t, y)


def on_any_time(self, x, t, y):
    return self.head(x, t, y) if (t < 0.5).any() else x  # the line


def loop_on_values(self, x, t, y):
    while x.abs().max() > 1:  # the line
        x = x / 2
    return self.head(x, t, y)


def int_of_label(self, x, t, y):
    return self.head(x, t, y) * self.label.weight[int(y[0])].sum()  # the line


def to_numpy(self, x, t, y):
    return self.head(x, t, y) * float(t.detach().numpy()[0])  # the line


def to_list(self, x, t, y):
    return self.head(x, t, y) * sum(t.tolist())  # the line


def on_batch(self, x, t, y):
    return self.head(x, t, y) if x.shape[0] <= 8 else x  # the line


def batch_of_three(self, x, t, y):
    return self.head(x.view(3, 3, 8, 8), t, y)  # the line


def even_batch(self, x, t, y):
    return self.head(x.reshape(-1, 2, *x.shape[1:]).flatten(0, 1), t, y)  # the line


def asserts_even_batch(self, x, t, y):
    assert x.shape[0] % 2 == 0, "give an even batch"  # the line
    return self.head(x, t, y)


def row_by_row(self, x, t, y):
    rows = [self.head(x[n : n + 1], t[n : n + 1], y[n : n + 1]) for n in range(x.shape[0])]  # the line
    return torch.cat(rows)


def shape_of_values(self, x, t, y):
    return x[x > 0]


def no_such_device(self, x, t, y):
    return self.head(x.to("cuda"), t, y)  # the line


def wrong_channels(self, x, t, y):
    return self.conv(x[:, :2])  # the line


def raises_its_own(self, x, t, y):
    raise KeyError("attention")  # the line


def untranslatable(self, x, t, y):
    return torch.linalg.eigvals(self.head(x, t, y)).real.unsqueeze(-1).expand(-1, -1, -1, 8)


def forgets_to_return(self, x, t, y):
    self.head(x, t, y)


def returns_a_number(self, x, t, y):
    return 3.0


def returns_others(self, x, t, y):
    return {"noise": x, "variance": x}


def returns_two(self, x, t, y):
    return x, self.head(x, t, y)


def takes_two(self, x, t):
    return self.conv(x) * t[:, None, None, None]


def prints(self, x, t, y):
    print("state", x, f"{t.mean()}")
    return self.head(x, t, y)


HOSTILE: dict[str, tuple[type[nn.Module], str]] = {
    "a branch on values": (network(on_value), "data-dependent"),
    "any()": (network(on_any_time), "data-dependent"),
    "a loop on values": (network(loop_on_values), "data-dependent"),
    "int()": (network(int_of_label), "data-dependent"),
    ".numpy()": (network(to_numpy), ".numpy()"),
    ".tolist()": (network(to_list), "B == 3"),
    "a module inside": (Nested, "stages.1.0 (Positive)"),
    "a branch on the batch": (network(on_batch), "B <= 8"),
    "a batch of three": (network(batch_of_three), "size"),
    "an even batch": (network(even_batch), "[-1, 2, 3, 8, 8]"),
    "a check on the batch": (network(asserts_even_batch), "give an even batch"),
    "row by row": (network(row_by_row), "B == 3"),
    "a UNet of diffusers": (UNet, "B < 64"),
    "a shape of values": (network(shape_of_values), "float32 ['u0']"),
    "a device": (network(no_such_device), "cuda"),
    "channels": (network(wrong_channels), "channels"),
    "an error of its own": (network(raises_its_own), "attention"),
    "no translation": (network(untranslatable), "aten.linalg_eig.default"),
    "no result": (network(forgets_to_return), "nothing"),
    "a number": (network(returns_a_number), "float"),
    "other names": (network(returns_others), "noise, variance"),
    "two without names": (network(returns_two), "2 without names"),
    "two arguments": (network(takes_two), "x, t, y"),
}
"""What cannot be exported -> what the message must say."""
