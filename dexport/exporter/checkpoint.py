"""Weights by name, read one at a time: safetensors, PyTorch files, Hub addresses, or seeded noise.

Nothing here holds more than the tensor that was asked for, except for PyTorch files in the format from before
version 1.6, which cannot be read in parts.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dexport.errors import InputError, MachineError, UsageError
from dexport.hashing import sha256_of

CONTAINERS = ("ema", "model_ema", "ema_state_dict", "model", "model_state_dict", "state_dict", "module")
"""Keys under which training code stores a state dict, in the order of preference: averaged weights first."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
LISTED = 20
ALIGNMENT_RECORD = ".storage_alignment"
SERVER_ERROR = 500


@dataclass(frozen=True)
class Origin:
    """Where weights came from; goes into the manifest as it is.

    ``kind`` is ``safetensors``, ``torch``, ``random``, or ``inherited``: partly from a file, partly random, as the
    lists of names say. ``container`` is the key that held the state dict, empty when the file is one. ``layout`` is the
    way in which the file stores them, empty where it is the model's own. ``sha256`` is of the whole file, empty for
    random weights.
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

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """The tensor as it is stored."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The contiguous tensor in ``dtype``.

        Raises:
            InputError: values that are not finite.
        """
        stored = self._read(name)
        if stored.is_complex() and not dtype.is_complex:
            raise InputError(
                f"{self.origin}: {name} is {stored.dtype}, which {dtype} cannot hold",
                hint="store its real and imaginary parts as the model expects them",
            )
        tensor = stored.to(dtype).contiguous()
        if dtype.is_floating_point and not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{self.origin}: {name} has {bad} NaN or infinite values out of {tensor.numel()}",
                hint="take an earlier checkpoint; a diverged run cannot be exported",
            )
        return tensor


Adapter = Callable[[WeightSource, nn.Module], WeightSource]
"""(file, network on the meta device) -> a view of the file under the network's names, or the file itself."""


class RandomSource(WeightSource):
    """Seeded noise in the shapes of a module, scaled so that activations neither vanish nor explode.

    Tables that the constructor computes (positions, relative indices) keep their values.
    """

    def __init__(self, meta_module: nn.Module, seed: int) -> None:
        state = meta_module.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.origin = Origin("random", seed=seed)
        self._tables = {name: tensor for name, tensor in state.items() if tensor.device.type != "meta"}

    def _read(self, name: str) -> Tensor:
        if name in self._tables:
            return self._tables[name]
        shape = self.shapes[name]
        rng = np.random.default_rng([self.origin.seed or 0, zlib.crc32(name.encode())])
        noise = torch.from_numpy(rng.random(shape, dtype=np.float32)).sub_(0.5)
        if len(shape) < 2:
            gain_at_one = 1.0 if name.endswith("weight") else 0.0
            return noise.mul_(0.1).add_(gain_at_one)
        fan_in = math.prod(shape[1:])
        return noise.mul_(math.sqrt(12 / fan_in))


class SafetensorsSource(WeightSource):
    """A ``.safetensors`` file. It is opened anew for each tensor, so that no mapping of it stays resident."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise InputError(
                f"{path} is not a whole safetensors file: {error}", hint="copy or download it again"
            ) from error
        self._path = path
        self._stored_name = _strip_prefixes(names)
        self.shapes = {name: shapes[stored] for name, stored in self._stored_name.items()}
        self.origin = Origin("safetensors", str(path), sha256_of(path), path.stat().st_size)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(self._stored_name[name])


class TorchSource(WeightSource):
    """A PyTorch file. Only its index is unpickled, by the restricted unpickler; each tensor is read from its offset."""

    def __init__(self, path: Path) -> None:
        loaded = _load_index(path)
        container, tensors = _find_state_dict(path, loaded)
        self._path = path
        self._tensors = {name: tensors[stored] for name, stored in _strip_prefixes(tensors).items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.origin = Origin("torch", str(path), sha256_of(path), path.stat().st_size, container)
        self._check_extent()

    def _check_extent(self) -> None:
        for name, tensor in self._tensors.items():
            offset, size = _extent(tensor)
            if offset is not None and offset + size > self.origin.size:
                raise InputError(f"{self._path} ends before the data of {name}", hint="copy or download it again")

    def _read(self, name: str) -> Tensor:
        index = self._tensors[name]
        offset, size = _extent(index)
        if offset is None:
            return index
        storage = torch.from_numpy(np.fromfile(self._path, np.uint8, size, offset=offset)).view(index.dtype)
        return storage.as_strided(index.shape, index.stride(), index.storage_offset())


def open_weights(
    checkpoint: str | Path | None, meta_module: nn.Module, *, seed: int = 0, adapt: Adapter | None = None
) -> WeightSource:
    """The weights that a build uses, checked against the module that will take them.

    Args:
        checkpoint: a file, ``hf://owner/name[@revision]/file``, a Hub id ``owner/name``, or None for seeded noise.
        meta_module: the network, whose state dict says which names and shapes are expected.
        adapt: shows the file as the network's state dict, for a recipe whose files have other layouts too.

    Raises:
        InputError: a bad file, or names and shapes that differ; each is listed.
        UsageError: no such file, or a negative seed.
        MachineError: the Hub cannot be reached.
    """
    if seed < 0:
        raise UsageError(f"--seed {seed} is negative", hint="give 0 or more")
    source = RandomSource(meta_module, seed) if checkpoint is None else open_file(locate(str(checkpoint)))
    if adapt is not None:
        source = adapt(source, meta_module)
    check_names(source, meta_module)
    check_index_tables(source, meta_module)
    return source


def open_file(path: Path) -> WeightSource:
    """Open a checkpoint file by its suffix."""
    if path.suffix == ".safetensors":
        return SafetensorsSource(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchSource(path)
    raise UsageError(f"{path}: unknown kind of checkpoint", hint=f"known are {', '.join(SUFFIXES)}")


def check_names(source: WeightSource, meta_module: nn.Module) -> None:
    """Raise InputError unless the source has exactly the module's names and shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in meta_module.state_dict().items()}
    problems = []
    missing = [name for name in expected if name not in source.shapes]
    unexpected = [name for name in source.shapes if name not in expected]
    wrong = [
        f"{name}: {list(source.shapes[name])} in the checkpoint, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if names:
            problems.append(f"{title} ({len(names)}):\n    " + "\n    ".join(shorten(names)))
    if problems:
        raise InputError(
            f"{source.origin} does not fit this model\n  " + "\n  ".join(problems),
            hint="choose the recipe that fits, or describe the variant with --set; "
            "`dexport info RECIPE` shows its settings",
        )


def check_index_tables(source: WeightSource, meta_module: nn.Module) -> None:
    """Raise InputError where an integer table of the checkpoint is not the one that the graph computes by itself."""
    for name, table in meta_module.state_dict().items():
        if table.device.type == "meta" or table.is_floating_point():
            continue
        if not torch.equal(source.read(name, table.dtype), table):
            raise InputError(
                f"{source.origin}: {name} is not the index that this network computes; "
                "the export would not be this checkpoint's model",
                hint="describe the variant with --set, or bring a recipe of your own",
            )


def load_into(source: WeightSource, meta_module: nn.Module) -> nn.Module:
    """Give a module built on the meta device its weights, in its own dtypes."""
    state = {name: source.read(name, tensor.dtype) for name, tensor in meta_module.state_dict().items()}
    meta_module.load_state_dict(state, assign=True)
    return meta_module


def locate(checkpoint: str) -> Path:
    """The local path of a checkpoint, downloaded from the Hub when it is an address there."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.is_dir():
        candidates = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        return path / _only([p.name for p in candidates], f"folder {path}")
    address = re.fullmatch(r"hf://([^/]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", checkpoint)
    if address:
        return _download(*address.groups())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) and path.suffix not in SUFFIXES:
        return _download(checkpoint, None, None)
    raise UsageError(f"checkpoint {checkpoint} does not exist", hint="give a file, or hf://owner/name/file for the Hub")


def _download(repo: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        if file is None:
            names = HfApi().list_repo_files(repo, revision=revision)
            file = _only([name for name in names if name.endswith(SUFFIXES)], f"hf://{repo}")
        return Path(hf_hub_download(repo, file, revision=revision))
    except HFValidationError as error:
        raise UsageError(f"hf://{repo}: {error}", hint="an address is hf://owner/name/file") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < SERVER_ERROR:
            raise InputError(f"hf://{repo}: {error}", hint="check the name, the revision and your access") from error
        raise MachineError(
            f"hf://{repo} cannot be reached: {error}", hint="download the file elsewhere and give its path"
        ) from error


def _only(names: list[str], where: str) -> str:
    if len(names) != 1:
        listed = "\n    ".join(shorten(names)) or "none"
        raise UsageError(f"{where} holds {len(names)} checkpoint files:\n    {listed}", hint="name one file")
    return names[0]


def _load_index(path: Path) -> Any:
    """Unpickle a PyTorch file with fake tensors that know their offset in the file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                is_zip = torch.serialization._is_zipfile(file)
            if not is_zip:
                return torch.load(path, map_location="cpu", weights_only=True)
            _check_alignment(path)
            with FakeTensorMode():
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise InputError(
                f"{path} is not a PyTorch checkpoint, or one that must run code when it is unpickled; that was refused",
                hint="save the weights with torch.save or, better, with safetensors.torch.save_file",
            ) from error
        raise InputError(
            f"{path} needs to run {refused[1]} when it is unpickled; that was refused",
            hint="if you trust its author, convert it once where nothing can be harmed: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=False)[...], 'weights.safetensors')",
        ) from error
    except Exception as error:
        # A damaged file makes the unpickler raise anything at all; what follows the first sentence is bad advice.
        reason = re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0]
        raise InputError(
            f"{path} is not a whole PyTorch checkpoint: {reason}", hint="copy or download it again"
        ) from error


def _check_alignment(path: Path) -> None:
    """Raise ValueError for an alignment of 0, by which the unpickler would divide: that ends the process."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(ALIGNMENT_RECORD) and int(archive.read(name)) < 1:
                raise ValueError("its storage alignment is not positive")


def _find_state_dict(path: Path, loaded: Any) -> tuple[str, dict[str, Tensor]]:
    """The container's key and the state dict inside it."""
    if isinstance(loaded, Mapping):
        for key in CONTAINERS:
            if _is_state_dict(loaded.get(key)):
                return key, dict(loaded[key])
        if _is_state_dict(loaded):
            return "", dict(loaded)
        found = ", ".join(map(str, list(loaded)[:LISTED]))
        raise InputError(f"{path} holds no state dict; its keys are: {found}", hint=f"known: {', '.join(CONTAINERS)}")
    raise InputError(
        f"{path} holds a {type(loaded).__name__}, not a state dict", hint="save module.state_dict() with torch.save"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(v, Tensor) and v.layout == torch.strided for v in value.values())
    )


def _strip_prefixes(stored: Iterable[str]) -> dict[str, str]:
    """Name without a wrapper's prefix -> name as stored. A prefix goes only when every name has it."""
    names = {name: name for name in stored}
    for prefix in (*PREFIXES, *PREFIXES):
        if names and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): original for name, original in names.items()}
    return names


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without the temporaries of ``torch.isfinite``."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _extent(tensor: Tensor) -> tuple[int | None, int]:
    """Offset in the file and size in bytes of a tensor's storage; the offset is None for one already in memory."""
    storage = tensor.untyped_storage()
    return getattr(storage, "_checkpoint_offset", None), storage.nbytes()


def shorten(names: list[str]) -> list[str]:
    """At most ``LISTED`` names, and how many more there are."""
    rest = len(names) - LISTED
    return [*names[:LISTED], f"... and {rest} more"] if rest > 0 else names
