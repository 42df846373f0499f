"""Images to features, and the names that distances over these features go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dexport.choices import EVALUATORS
from dexport.errors import UsageError
from dexport.validate.distances import PIXELS, pooled_pixels

if TYPE_CHECKING:  # pixels need no torch
    from torch import Tensor, nn


class Features(NamedTuple):
    """Of B images: ``pool`` (B, D), and where the network gives them ``spatial`` (B, S) and ``logits`` (B, K)."""

    pool: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluator:
    """A feature network.

    Attributes:
        name: one of ``EVALUATORS``.
        distance: what a Fréchet distance over ``pool`` is called. Only the published Inception's is called FID.
        spatial_distance: the same for ``spatial``; empty where there is none.
        weights, sha256: the file, and the hash of all of it; empty for pixels.
        extract: uint8 images (B, H, W, 1 or 3) -> features.
    """

    name: str
    distance: str
    extract: Callable[[np.ndarray], Features]
    spatial_distance: str = ""
    weights: str = ""
    sha256: str = ""


def open_evaluator(name: str, weights: Path | None = None) -> Evaluator:
    """An evaluator with its weights.

    Args:
        weights: a file; without one, those inside the installed package of the extra ``fid``.

    Raises:
        UsageError: an unknown name, or weights for pixels.
        MachineError: no weights here.
        InputError: weights of another network.
    """
    if name == "inception":
        return _inception(weights)
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(weights)
    if name != "pixels":
        raise UsageError(f"there is no evaluator {name!r}", hint=f"there are {', '.join(EVALUATORS)}")
    if weights is not None:
        raise UsageError("--evaluator pixels has no weights", hint="leave out --weights")
    return Evaluator(name, PIXELS, lambda images: Features(pooled_pixels(images)))


def _inception(weights: Path | None) -> Evaluator:
    from dexport.validate.features.inception import SIDE
    from dexport.validate.features.inception_weights import load_inception

    network, origin, defines_fid = load_inception(weights)
    run = _runner(network, SIDE, mean=128)
    return Evaluator(
        "inception",
        "FID" if defines_fid else "Fréchet distance (Inception with other weights)",
        lambda images: Features(*run(images)),
        "sFID" if defines_fid else "spatial Fréchet distance (Inception with other weights)",
        origin.path,
        origin.sha256,
    )


def _efficientnet_lite0(weights: Path | None) -> Evaluator:
    from dexport.validate.features.efficientnet_lite import SIDE, load_efficientnet_lite0

    network, origin = load_efficientnet_lite0(weights)
    run = _runner(network, SIDE, mean=127)
    return Evaluator(
        "efficientnet-lite0",
        "Fréchet distance (EfficientNet-Lite0)",
        lambda images: Features(*run(images)),
        weights=origin.path,
        sha256=origin.sha256,
    )


def _runner(network: nn.Module, side: int, mean: int) -> Callable[[np.ndarray], Any]:
    """uint8 (B, H, W, 1 or 3) -> the network's outputs of (image - mean) / 128, as a tuple of arrays or None."""
    import torch

    from dexport.exporter.pytorch.state import fresh_torch
    from dexport.validate.features.resize import resize_tf1

    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def to_array(tensor: Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.numpy()

    @fresh_torch()
    @torch.inference_mode()
    def run(images: np.ndarray) -> tuple[np.ndarray | None, ...]:
        pixels = torch.from_numpy(np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images.copy())
        resized = resize_tf1(pixels.permute(0, 3, 1, 2).float(), side)
        out = network(((resized - mean) / 128).contiguous(memory_format=torch.channels_last))
        return tuple(map(to_array, out)) if isinstance(out, tuple) else (to_array(out),)

    return run
