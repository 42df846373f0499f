"""What a network returns, as its signature declares it: a mapping, a dataclass or a tuple becomes its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dexport.errors import InputError


def return_declared(network: nn.Module, owner: str, names: Callable[[], Sequence[str]]) -> nn.Module:
    """Make a network return the tensor that ``names`` declare, or a tuple of several in that order, whatever its own
    ``forward`` returns: see :func:`as_declared`. The network is changed in place; the names are asked for as it runs.
    """

    def hook(_module: nn.Module, _inputs: object, result: Any) -> Tensor | tuple[Tensor, ...]:
        return as_declared(result, owner, names())

    network.register_forward_hook(hook)
    return network


def as_declared(result: Any, owner: str, names: Sequence[str]) -> Tensor | tuple[Tensor, ...]:
    """The declared outputs in what a network returned.

    They are taken by name where results have names (mappings, dataclasses, named tuples); others are left out, and a
    single one may have any name. Without names they are taken by position, as many as are declared.

    Args:
        result: a tensor, or several in a mapping, a dataclass or a sequence; those that are None are not there.
        owner: whose network it is, for messages.

    Raises:
        InputError: other outputs than were declared.
    """
    hint = "declare in the recipe's signature what the network returns, or return what is declared"
    named = _by_name(result)
    if named is None:
        values = [value for value in (result if isinstance(result, (tuple, list)) else [result]) if value is not None]
        came = f"{len(values)} without names" if values else "nothing"
        complete = len(values) == len(names)
    else:
        came = ", ".join(map(str, named)) or "nothing"
        complete = all(name in named for name in names) or len(named) == len(names) == 1
        by_name = len(named) != 1
        values = [named[name] for name in names] if complete and by_name else list(named.values())
    if not complete:
        raise InputError(f"{owner}: outputs {', '.join(names)} are declared, and the network returns {came}", hint=hint)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise InputError(f"{owner}: output {name} is a {type(value).__name__}, not a tensor", hint=hint)
    return values[0] if len(values) == 1 else tuple(values)


def _by_name(result: Any) -> dict[Any, Any] | None:
    """Results that have names, without those that are None."""
    if isinstance(result, Mapping):
        named = dict(result)
    elif isinstance(result, tuple) and hasattr(result, "_asdict"):
        named = result._asdict()
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        named = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    else:
        return None
    return {name: value for name, value in named.items() if value is not None}
