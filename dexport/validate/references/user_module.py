"""A module of the user's own as the reference, such as the official code: ``path/to/file.py:Class``."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dexport.errors import InputError, UsageError
from dexport.exporter.pytorch.declared import as_declared, return_declared
from dexport.exporter.torch_session import TorchSession
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import check_names
from dexport.exporter.weights.source import WeightSource

FORM = "give path/to/file.py:Class"
ROWS = 2


def session_against(address: str, variant: Variant, weights: WeightSource) -> TorchSession:
    """The user's module with the bundle's configuration and weights, in place of dexport's own network.

    Args:
        address: ``file.py:Class``; the file's folder may be imported from. A function that returns a module will do.

    Raises:
        UsageError: no such file or class, a file that fails to load, a constructor that refuses the configuration.
        InputError: parameters that are not exactly those of the checkpoint, outputs that are not those of the bundle.
    """
    path, name = _parse(address)
    with _importing_from(path.parent):
        constructor = _find(_load(path), path, name)
        module = _construct(constructor, address, variant.config)
        try:
            check_names(weights, module)
        except InputError as error:
            raise InputError(
                f"{address} does not take the weights that the bundle was built from: {error}",
                hint="its parameters must have the names and shapes of the checkpoint",
            ) from error
        state = module.state_dict()
        module.load_state_dict({key: weights.read(key, tensor.dtype) for key, tensor in state.items()}, strict=True)
        session = TorchSession(variant.wrap(module.float().eval()), variant.signature)
        _check_outputs(module, address, variant)
        return_declared(module, address, lambda: [spec.name for spec in variant.plain.outputs])
    session.runner += f", {address}"
    return session


def _parse(address: str) -> tuple[Path, str]:
    file, colon, name = address.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"--against {address!r} names no class", hint=FORM)
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"--against {address!r}: {path} is a folder", hint=FORM)
    if not path.is_file():
        raise UsageError(f"--against {address!r}: {path} does not exist", hint=FORM)
    return path.resolve(), name


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Official code imports its neighbours by their bare names, sometimes only when it runs."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dexport_against_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--against: {path} is not a Python file", hint=FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"--against: {path} failed to load: {type(error).__name__}: {error}",
            hint="install what it imports, or correct the file",
        ) from error
    return module


def _find(module: ModuleType, path: Path, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    classes = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
    near = difflib.get_close_matches(name, classes, n=2)
    raise UsageError(
        f"--against: {path} has no {name}",
        hint=f"did you mean {' or '.join(near)}?" if near else f"its modules are {', '.join(classes) or 'none'}",
    )


def _construct(constructor: Any, address: str, config: Mapping[str, Any]) -> nn.Module:
    shown = ", ".join(f"{key}={value!r}" for key, value in config.items())
    if not callable(constructor):
        raise UsageError(f"--against {address}: that is no class", hint=FORM)
    try:
        inspect.signature(constructor).bind(**config)
        module = constructor(**config)
    except Exception as error:
        raise UsageError(
            f"--against {address}: the constructor refuses the bundle's configuration: {error}",
            hint=f"it is called with {shown}; wrap it in a function with these arguments if its own are others",
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--against {address} makes a {type(module).__name__}, not a torch.nn.Module", hint=FORM)
    return module


def _check_outputs(module: nn.Module, address: str, variant: Variant) -> None:
    """Run the plain network once: what is wrong here would fail later in the middle of a level."""
    signature = variant.plain
    example = signature.example(ROWS)
    arguments = [torch.from_numpy(example[spec.name]) for spec in signature.inputs]
    names = ", ".join(spec.name for spec in signature.inputs)
    try:
        with torch.inference_mode():
            results = module(*arguments)
    except Exception as error:
        raise InputError(
            f"{address} fails when it is called with ({names}): {type(error).__name__}: {error}",
            hint="its forward must take the bundle's inputs by position; wrap it where it takes others",
        ) from error
    with suppress(InputError):  # what is not as declared is listed below
        results = as_declared(results, address, [spec.name for spec in signature.outputs])
    tensors = results if isinstance(results, tuple) else (results,)
    wanted = [list(spec.dims(ROWS)) for spec in signature.outputs]
    got = [list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__ for tensor in tensors]
    if got != wanted:
        outputs = ", ".join(spec.name for spec in signature.outputs)
        raise InputError(
            f"{address} returns {', '.join(map(str, got))} for a batch of {ROWS}; expected {outputs}: "
            f"{', '.join(map(str, wanted))}",
            hint="its forward must return the bundle's outputs, in their order; wrap it where it returns others",
        )
