"""Named tensors that are read on demand, and where they came from."""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dexport.errors import InputError
from dexport.exporter.weights.file import CheckpointFile
from dexport.exporter.weights.stored import Stored


@dataclass(frozen=True)
class Origin:
    """Where weights came from; goes into the manifest as it is.

    ``kind`` is ``safetensors``, ``torch``, ``torchscript``, ``random``, or ``inherited``: partly from a file, partly
    random, as the lists of names say. ``container`` is the key that held the state dict, empty when the file is one.
    ``layout`` is the way in which the file stores them, empty where it is the model's own. ``sha256`` is of the whole
    file, empty for random weights; of an index and its files, it is of their hashes.
    """

    kind: str
    path: str = ""
    sha256: str = ""
    size: int = 0
    container: str = ""
    layout: str = ""
    seed: int | None = None
    inherited: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def random(self) -> bool:
        """Whether any weight is noise."""
        return self.kind in ("random", "inherited")

    def __str__(self) -> str:
        if self.kind == "random":
            return f"RANDOM weights (seed {self.seed}), not a trained model"
        if self.kind == "inherited":
            return (
                f"{len(self.inherited)} tensors of {self.path}, {len(self.fresh)} RANDOM (seed {self.seed}), "
                f"{len(self.dropped)} of the file left out; not a trained model"
            )
        layout = f" ({self.layout} layout)" if self.layout else ""
        return self.path + (f" [{self.container}]" if self.container else "") + layout


class WeightSource(ABC):
    """Named tensors that are read on demand."""

    shapes: Mapping[str, tuple[int, ...]]
    origin: Origin
    buffers: Collection[str] = frozenset()
    """Tensors that are not trained. A mask is one, and may be infinite."""

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """The tensor as it is stored."""

    def check_unchanged(self) -> None:  # noqa: B027
        """Raise InputError if a file behind it was changed or exchanged since it was opened; noise has none."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The contiguous tensor in ``dtype``.

        Raises:
            InputError: values that are not finite, but for infinite ones that a buffer was stored with.
        """
        stored = self._read(name)
        if stored.is_complex() and not dtype.is_complex:
            raise InputError(
                f"{self.origin}: {name} is {stored.dtype}, which {dtype} cannot hold",
                hint="store its real and imaginary parts as the model expects them",
            )
        try:
            tensor = stored.to(dtype).contiguous()
        except RuntimeError as error:
            raise InputError(
                f"{self.origin}: {name} is {stored.dtype}, which cannot become {dtype}",
                hint="store it in a floating-point type",
            ) from error
        if dtype.is_floating_point and not is_finite(tensor):
            infinite = torch.isinf(tensor) & torch.isinf(stored)
            bad = int((~torch.isfinite(tensor) & ~(infinite & (name in self.buffers))).sum())
            if not bad:
                return tensor
            raise InputError(
                f"{self.origin}: {name} has {bad} NaN or infinite values out of {tensor.numel()}",
                hint="take an earlier checkpoint; a diverged run cannot be exported",
            )
        return tensor


def buffers_of(module: nn.Module) -> frozenset[str]:
    """The names in a module's state dict that are no parameters."""
    return frozenset(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)}


Adapter = Callable[[WeightSource, nn.Module], WeightSource]
"""(file, network on the meta device) -> a view of the file under the network's names, or the file itself."""


VARIANCE = re.compile(r"(^|[._])(var|variance|std)s?$")
"""Names of buffers that norms take the root of or divide by."""


class RandomSource(WeightSource):
    """Seeded noise in the shapes of a module, scaled so that activations neither vanish nor explode.

    Tables that the constructor computes (positions, relative indices) keep their values; variances are near one, and
    what is tied is equal.
    """

    def __init__(self, meta_module: nn.Module, seed: int) -> None:
        state = meta_module.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        self._tied = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.origin = Origin("random", seed=seed)
        self._tables = {name: tensor for name, tensor in state.items() if tensor.device.type != "meta"}
        self._variances = {name for name in buffers_of(meta_module) if VARIANCE.search(name)}

    def _read(self, name: str) -> Tensor:
        if name in self._tables:
            return self._tables[name].detach()
        shape, name = self.shapes[name], self._tied[name]
        rng = np.random.default_rng([self.origin.seed or 0, zlib.crc32(name.encode())])
        noise = torch.from_numpy(rng.random(shape, dtype=np.float32)).sub_(0.5)
        if len(shape) < 2 or name in self._variances:
            around_one = name.endswith("weight") or name in self._variances
            return noise.mul_(0.1).add_(1.0 if around_one else 0.0)
        fan_in = math.prod(shape[1:])
        return noise.mul_(math.sqrt(12 / fan_in))


class TensorSource(WeightSource):
    """Tensors of files that stay open while the source exists."""

    def __init__(self, tensors: Mapping[str, Stored], files: tuple[CheckpointFile, ...], origin: Origin) -> None:
        self._tensors = tensors
        self._files = files
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.origin = origin

    def _read(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def check_unchanged(self) -> None:
        for file in self._files:
            file.check_unchanged()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without the temporaries of ``torch.isfinite``."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
