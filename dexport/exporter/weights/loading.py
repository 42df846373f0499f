"""Weights for a network: found, checked against the module that will take them, and given to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dexport.errors import InputError, UsageError
from dexport.exporter.weights.address import locate, shorten, split_container
from dexport.exporter.weights.choice import MisfitError, choose
from dexport.exporter.weights.containers import ROOT, Fixed, Form
from dexport.exporter.weights.opened import Checkpoint
from dexport.exporter.weights.source import Adapter, RandomSource, WeightSource, buffers_of


def open_weights(
    checkpoint: str | Path | None,
    meta_module: nn.Module,
    *,
    seed: int = 0,
    adapt: Adapter | None = None,
    sha256: str = "",
) -> WeightSource:
    """The weights that a build uses, checked against the module that will take them.

    Args:
        checkpoint: a file, ``hf://owner/name[@revision]/file``, a Hub id ``owner/name``, or None for seeded noise.
            ``::key`` after it names one of the state dicts in the file; without, the averaged one is taken.
        meta_module: the network, whose state dict says which names and shapes are expected.
        adapt: shows the file as the network's state dict, for a recipe whose files have other layouts too.
        sha256: what the file must have; empty for any.

    Raises:
        InputError: a bad file, or names and shapes that differ; each is listed.
        UsageError: no such file, or a negative seed.
        MachineError: the Hub cannot be reached.
    """
    if seed < 0:
        raise UsageError(f"--seed {seed} is negative", hint="give 0 or more")
    adapt = adapt or (lambda source, _: source)
    if checkpoint is None:
        source = adapt(RandomSource(meta_module, seed), meta_module)
        check_names(source, meta_module)
    else:

        def fit(source: WeightSource) -> WeightSource:
            adapted = adapt(source, meta_module)
            problems = _differences(adapted, meta_module)
            if problems:
                raise MisfitError(sum(map(len, problems.values())), _misfit(adapted, problems))
            return adapted

        source = fitting_source(str(checkpoint), meta_module, fit, sha256)
    source.buffers = buffers_of(meta_module)
    check_index_tables(source, meta_module)
    return source


def fitting_source(
    checkpoint: str, meta_module: nn.Module, fit: Callable[[WeightSource], WeightSource], sha256: str = ""
) -> WeightSource:
    """What ``fit`` makes of the state dict of a checkpoint that is meant for a network.

    Args:
        fit: raises :class:`MisfitError` where one does not fit.

    Raises:
        InputError, UsageError, MachineError: see :func:`open_weights`.
    """
    _, wanted = split_container(checkpoint)
    buffers = frozenset(name for name, _ in meta_module.named_buffers())
    frozen = frozenset(name for name, parameter in meta_module.named_parameters() if not parameter.requires_grad)
    opened = Checkpoint(locate(checkpoint), Fixed(buffers, frozen), sha256)

    def make(form: Form) -> WeightSource:
        # That the file itself was asked for must not be forgotten: it may hold an average, too.
        return fit(opened.source(replace(form, label=ROOT) if wanted == ROOT else form))

    return choose(str(opened.path), opened.forms, opened.unread, make, meta_module.state_dict().keys(), wanted)


def open_file(path: Path) -> WeightSource:
    """Open a checkpoint file by its content, where no network says which of its state dicts is meant.

    Raises:
        InputError: a bad file.
        UsageError: a file of another kind.
    """
    return Checkpoint(path).default()


def check_names(source: WeightSource, meta_module: nn.Module) -> None:
    """Raise InputError unless the source has exactly the module's names and shapes."""
    problems = _differences(source, meta_module)
    if problems:
        raise _misfit(source, problems)


def _differences(source: WeightSource, meta_module: nn.Module) -> dict[str, list[str]]:
    """What does not fit, by kind."""
    expected = {name: tuple(tensor.shape) for name, tensor in meta_module.state_dict().items()}
    found = {
        "missing": [name for name in expected if name not in source.shapes],
        "unexpected": [name for name in source.shapes if name not in expected],
        "wrong shape": [
            f"{name}: {list(source.shapes[name])} in the checkpoint, {list(shape)} in the model"
            for name, shape in expected.items()
            if name in source.shapes and source.shapes[name] != shape
        ],
    }
    return {kind: names for kind, names in found.items() if names}


def _misfit(source: WeightSource, problems: dict[str, list[str]]) -> InputError:
    listed = [f"{kind} ({len(names)}):\n    " + "\n    ".join(shorten(names)) for kind, names in problems.items()]
    return InputError(
        f"{source.origin} does not fit this model\n  " + "\n  ".join(listed),
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
    """Give a module built on the meta device its weights, in its own dtypes.

    Raises:
        InputError: values that are not finite, or a file that is no longer the one that was opened.
    """
    state = {name: source.read(name, tensor.dtype) for name, tensor in meta_module.state_dict().items()}
    source.check_unchanged()
    meta_module.load_state_dict(state, assign=True)
    return meta_module
