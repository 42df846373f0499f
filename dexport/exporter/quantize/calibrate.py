"""Calibration: statistics of every layer's input while the PyTorch model samples.

The model runs along its recipe's own trajectory: its sampler, its guidance with both halves of the batch, classes
spread over all there are. Inputs drawn at random would show activations that sampling never meets.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dexport.drafts import clear_remains
from dexport.errors import InputError, UsageError
from dexport.exporter.quantize.layers import stays_convolution
from dexport.exporter.quantize.observer import METHODS, LayerStatistics, Statistics, TensorStatistics
from dexport.exporter.trajectory import TorchNetwork, run_steps
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource
from dexport.files import replacing
from dexport.limits import LARGEST_SEED, MOST_CALIBRATION_IMAGES, check_whole
from dexport.version import __version__

FEWEST_IMAGES = 4
DEFAULT_IMAGES = 32
STEPS = 20
"""Evenly spaced over the schedule, each observed: neighbouring steps of a longer trajectory look alike."""
BATCH = 8

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """Settings; the same ones give the same statistics.

    Attributes:
        images: how many trajectories.
        steps: sampling steps of each.
        batch: images that are sampled together; guidance doubles it.
        method: how a threshold is chosen: ``mse``, ``percentile`` or ``absmax``.
    """

    images: int = DEFAULT_IMAGES
    seed: int = 0
    steps: int = STEPS
    batch: int = BATCH
    method: str = "mse"

    def __post_init__(self) -> None:
        if self.images < FEWEST_IMAGES:
            raise UsageError(
                f"{self.images} calibration images are too few to know the range of an activation",
                hint=f"--calibration-images {FEWEST_IMAGES} or more; {DEFAULT_IMAGES} is the default",
            )
        check_whole("--calibration-images", self.images, MOST_CALIBRATION_IMAGES)
        check_whole("--calibration-seed", max(0, self.seed), LARGEST_SEED)
        if self.seed < 0:
            raise UsageError(f"--calibration-seed {self.seed} is negative", hint="give 0 or more")
        if self.method not in METHODS:
            raise UsageError(f"no calibration method {self.method!r}", hint=f"choose from {', '.join(METHODS)}")


def calibrate(
    variant: Variant,
    weights: WeightSource,
    settings: Calibration,
    layers: Collection[str],
    partial: Path,
    on_progress: OnProgress,
) -> Statistics:
    """Sample with the PyTorch model and observe some of its layers.

    Args:
        layers: module paths of linear layers and dense convolutions.
        partial: where the statistics so far are kept after each batch; a run that finds those of the same build and
            settings goes on from there. The caller removes it.

    Raises:
        InputError: activations that are not finite.
    """
    module = load_into(weights, variant.meta_module()).eval()
    observed = {path: layer for path, layer in module.named_modules() if path in layers}
    statistics = {path: LayerStatistics(_weight_absmax(layer)) for path, layer in observed.items()}
    key = calibration_key(variant, weights, settings, layers)
    clear_remains(partial.parent, partial.name)
    done = _resume(partial, key, statistics)
    network = TorchNetwork(variant, module)
    with watching(observed, lambda path, layer, x, out: _observe(statistics[path], layer, x, out, network.time)):
        for finished in sample_batches(variant, network, settings, done, on_progress):
            weights.check_unchanged()
            _save(partial, key, finished, statistics)
    return statistics


def sample_batches(
    variant: Variant, network: TorchNetwork, settings: Calibration, done: int, on_progress: OnProgress
) -> Iterator[int]:
    """Run the program for the images of a calibration; yields how many batches are finished after each.

    Args:
        done: batches that an earlier run finished: they are left out.
    """
    batches = [range(n, min(n + settings.batch, settings.images)) for n in range(0, settings.images, settings.batch)]
    for number, images in enumerate(batches[done:], start=done):
        on_progress(number, len(batches), f"images {images.start} to {images.stop - 1}")
        for _ in run_steps(variant, network, images, settings.images, settings.seed, settings.steps):
            pass
        yield number + 1
    on_progress(len(batches), len(batches), "")


def _weight_absmax(layer: nn.Module) -> np.ndarray:
    weight = layer.weight.detach()  # type: ignore[operator]
    return weight.abs().amax([axis for axis in range(weight.ndim) if axis != 1]).float().numpy()


OnLayer = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Told about a call of a layer: its path, the layer, its input and its output."""


@contextlib.contextmanager
def watching(layers: Mapping[str, nn.Module], on_layer: OnLayer) -> Iterator[None]:
    """Call back for every forward pass of the layers while the block runs. An InputError gets the layer's name."""

    def watch(path: str, layer: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            try:
                on_layer(path, layer, inputs[0], output)
            except InputError as error:
                raise InputError(
                    f"calibration: {path}: {error}", hint="the model diverges while it samples: check the checkpoint"
                ) from error

        return hook

    handles = [layer.register_forward_hook(watch(path, layer)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(seen: LayerStatistics, layer: nn.Module, x: Tensor, output: Tensor, time: float) -> None:
    seen.input.observe(x.numpy(), channel_axis(layer), time)
    if stays_convolution(layer):
        bias = 0 if layer.bias is None else layer.bias.reshape(-1, 1, 1)  # type: ignore[operator]
        seen.output.observe((output - bias).numpy(), channel_axis(layer), time)


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's input and output that counts channels."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def calibration_key(variant: Variant, weights: WeightSource, settings: Calibration, layers: Collection[str]) -> str:
    """What a calibration depends on; another version may calibrate otherwise."""
    origin = weights.origin
    return json.dumps(
        [
            __version__,
            variant.recipe.name,
            variant.config_json(),
            variant.latent,
            [origin.kind, origin.sha256, origin.seed],
            asdict(settings),
            None if variant.within is None else variant.within.key,
            sorted(layers),
        ]
    )


def _save(path: Path, key: str, done: int, statistics: Statistics) -> None:
    """Write the statistics so far; a kill leaves the previous file."""
    arrays: dict[str, Any] = {
        f"{layer}:{part}:{name}": array
        for layer, seen in statistics.items()
        for part, tensor in (("input", seen.input), ("output", seen.output))
        if tensor.ranges
        for name, array in tensor.arrays().items()
    }
    with replacing(path) as file:
        np.savez_compressed(file, key=np.array(key), done=np.array(done), **arrays)


def _resume(path: Path, key: str, statistics: Statistics) -> int:
    """Fill in what an earlier run of the same build observed; returns how many batches that was."""
    if not path.exists():
        return 0
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return 0
            for layer, seen in statistics.items():
                for part in ("input", "output"):
                    names = [name for name in file.files if name.startswith(f"{layer}:{part}:")]
                    if names:
                        arrays = {name.rpartition(":")[2]: file[name] for name in names}
                        setattr(seen, part, TensorStatistics.of_arrays(arrays))
            return int(file["done"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} holds no calibration: {error}", hint=f"remove it: rm {shlex.quote(str(path))}"
        ) from error
