"""Whether a recipe is what it should be: files of users are read as they are."""

from __future__ import annotations

import dataclasses
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any

from dexport.errors import InputError
from dexport.exporter.recipes.recipe import BATCH, DEFAULT_GATES, Recipe, Signature, TensorSpec

HINT = "correct the recipe: docs/your-own-backbone.md shows a whole one"


def check_recipe(recipe: Recipe) -> None:
    """Refuse attributes of wrong types or out of range.

    Raises:
        InputError: the first of them, with what was expected.
    """
    owner = f"recipe {recipe.name}" if isinstance(recipe.name, str) and recipe.name else "the recipe"
    _check_types(recipe, owner)
    facts, guidance = recipe.sampling, recipe.guidance
    wrong = {
        "name": not recipe.name or not recipe.name.isprintable(),
        "latent": min(recipe.latent) < 1,
        "gates": not (set(recipe.gates) <= set(DEFAULT_GATES) and all(map(math.isfinite, recipe.gates.values()))),
        "sampling.steps": facts is not None and facts.steps < 1,
        "sampling.latent_scale": facts is not None and not 0 < abs(facts.latent_scale) < math.inf,
        "guidance.default_scale": guidance is not None and not 1 <= guidance.default_scale < math.inf,
        "guidance.clock": guidance is not None and not 0 < abs(guidance.clock[1] - guidance.clock[0]) < math.inf,
    }
    expected = {
        "name": "a printable name",
        "latent": "(height, width) from 1",
        "gates": f"finite numbers for {', '.join(DEFAULT_GATES)}",
        "sampling.steps": "1 or more",
        "sampling.latent_scale": "a finite number other than 0",
        "guidance.default_scale": "a finite number from 1",
        "guidance.clock": "two different times",
    }
    for name, bad in wrong.items():
        if bad:
            value: Any = recipe
            for part in name.split("."):
                value = getattr(value, part)
            raise InputError(f"{owner}: {name} is {value!r}; expected {expected[name]}", hint=HINT)


def check_signature(owner: str, signature: object) -> Signature:
    """A signature that a recipe's function gave, as it is.

    Raises:
        InputError: it is none, or has ports that cannot be.
    """
    if not isinstance(signature, Signature):
        raise InputError(f"{owner}: the signature is a {type(signature).__name__}; expected a Signature", hint=HINT)
    _check_types(signature, f"{owner}: the signature")
    ports = (*signature.inputs, *signature.outputs)
    names = [port.name for port in ports]
    for kind, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        if not specs:
            raise InputError(f"{owner}: the signature has no {kind}", hint=HINT)
    for port in ports:
        problem = _problem(port, is_output=port in signature.outputs)
        if names.count(port.name) > 1:
            problem = "its name is used twice"
        if problem:
            shape = list(port.shape)
            raise InputError(f"{owner}: port {port.name} ({port.dtype} {shape}, {port.values}): {problem}", hint=HINT)
    return signature


def _problem(port: TensorSpec, is_output: bool) -> str:
    """What is wrong with a port; empty for nothing."""
    if not port.name.isidentifier():
        return "its name is no identifier"
    if any(dim != BATCH if isinstance(dim, str) else dim < 1 for dim in port.shape):
        return f'dimensions are 1 or more, or "{BATCH}"'
    if BATCH in port.shape[1:] or (is_output and BATCH not in port.shape):
        return f'the batch, "{BATCH}", is the first dimension'
    if not all(map(math.isfinite, (port.low, port.high, *port.choices))):
        return "its range is not finite"
    if port.values == "stratified" and port.shape != (BATCH,):
        return f'stratified values have the shape ["{BATCH}"]'
    return ""


def _check_types(value: Any, owner: str) -> None:
    """Refuse a dataclass one of whose fields, or of their own, has another type than it was declared with."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if not fits(given, hints[field.name]):
            raise InputError(
                f"{owner}: {field.name} is {_short(given)}, a {type(given).__name__}; expected {field.type}", hint=HINT
            )
        nested = given if isinstance(given, tuple) else (given,)
        for item in nested:
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                name = getattr(item, "name", "")
                _check_types(item, f"{owner}: {field.name}" + (f": {name}" if isinstance(name, str) and name else ""))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as an annotation says it; the fields of dataclasses are not looked at."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint in (None, NoneType):
        return value is None
    if origin in (typing.Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is not None and issubclass(origin, Mapping):
        kinds = isinstance(value, Mapping)
        return kinds and all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items())
    if hint is Callable or origin is Callable:
        return callable(value)
    number = {int: numbers.Integral, float: numbers.Real}.get(hint)
    if number is not None:
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
