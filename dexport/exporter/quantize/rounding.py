"""Weights that are rounded along a calibration: Hessians from the sampling trajectory, then a file per layer.

Hessians of a whole network would not fit into memory, so that it is sampled once for every group of layers whose
Hessians do. What is done is kept beside the bundle: a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dexport.errors import InputError
from dexport.exporter.quantize.calibrate import (
    Calibration,
    OnProgress,
    calibration_key,
    channel_axis,
    sample_batches,
    watching,
)
from dexport.exporter.quantize.layers import NetworkLayers
from dexport.exporter.quantize.rounded import RoundedWeights, load_arrays, save_arrays
from dexport.exporter.trajectory import TorchNetwork
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource

HESSIAN_BYTES = 1 << 30
"""Of all Hessians that are collected together."""
Wanted = Mapping[str, Sequence[str]]
"""Module path -> schemes that its weight is rounded to."""


def round_weights(
    variant: Variant,
    weights: WeightSource,
    settings: Calibration,
    wanted: Wanted,
    layers: NetworkLayers,
    folder: Path,
    on_progress: OnProgress,
) -> RoundedWeights:
    """Sample with the PyTorch model, collect the Hessians of its layers' inputs, and round their weights.

    Args:
        folder: where the rounded weights are kept; those of the same build and settings are not made again. The
            caller removes it.

    Raises:
        InputError: activations that are not finite.
    """
    store = RoundedWeights(folder)
    store.claim(calibration_key(variant, weights, settings, ()))
    missing = [path for path in wanted if not all(store.has(path, scheme) for scheme in wanted[path])]
    if not missing:
        return store
    module = load_into(weights, variant.meta_module()).eval()
    groups = list(_groups(missing, layers))
    for number, group in enumerate(groups):
        chosen = {path: module.get_submodule(path) for path in group}
        file = folder / "hessians.npz"

        def tell(done: int, total: int, detail: str, number: int = number) -> None:
            on_progress(number * total + done, len(groups) * total, detail)

        hessians = _collect(variant, module, chosen, settings, file, tell)
        for path in group:
            weight = chosen[path].weight.detach().flatten(1)  # type: ignore[operator]
            for scheme in wanted[path]:
                on_progress(number + 1, len(groups), f"{path}: {scheme}")
                store.save(path, scheme, weight, hessians.pop(path) if scheme == wanted[path][-1] else hessians[path])
        file.unlink()
    return store


def _groups(paths: Sequence[str], layers: NetworkLayers) -> Iterator[list[str]]:
    """Layers in order, as many together as their Hessians fit into memory."""
    group: list[str] = []
    used = 0
    for path in paths:
        size = 4 * layers[path].columns ** 2
        if group and used + size > HESSIAN_BYTES:
            yield group
            group, used = [], 0
        group.append(path)
        used += size
    yield group


def _collect(
    variant: Variant,
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    settings: Calibration,
    file: Path,
    on_progress: OnProgress,
) -> dict[str, Tensor]:
    """H = X^T X (in, in) float32 of every layer's input rows X, over the whole calibration."""
    key = "\n".join(layers)
    hessians: dict[str, Tensor] = {}
    done = 0
    if file.exists():
        arrays = load_arrays(file)
        if str(arrays.pop("key")) == key:
            done = int(arrays.pop("done"))
            hessians = {path: torch.from_numpy(array) for path, array in arrays.items()}
    network = TorchNetwork(variant, module)

    def observe(path: str, layer: nn.Module, x: Tensor, _output: Tensor) -> None:
        rows = x.movedim(channel_axis(layer), -1).flatten(0, -2)
        product = rows.T @ rows
        if not torch.isfinite(product).all():
            raise InputError(f"inputs that are NaN, infinite or too large at time {network.time:g}")
        hessians[path] = hessians[path].add_(product) if path in hessians else product

    with watching(layers, observe):
        for finished in sample_batches(variant, network, settings, done, on_progress):
            save_arrays(file, key=np.array(key), done=np.array(finished), **{p: h.numpy() for p, h in hessians.items()})
    return hessians
