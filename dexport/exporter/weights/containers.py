"""What training code wraps around a state dict, and which of the weights in a file are meant.

A file becomes *forms*: state dicts under plain names, each with a label that says where it lay. Averaged weights (EMA,
SWA) come before others. Which form is taken depends on the network that it must fit; see :mod:`.choice`.

| Written by | Looks like |
| --- | --- |
| a training loop | the state dict, or under ``model``, ``ema``, ``model_ema``, ``ema_state_dict``, ..., several deep |
| diffusers, torch_ema | ``{"shadow_params": [...]}``: a list in the order of the model's parameters |
| the usual ``class EMA`` | ``{"shadow": {...}}``: parameters only; buffers are the model's |
| timm, ``AveragedModel``, DDP | names begin with ``module.``; ``n_averaged`` beside them |
| ema-pytorch | ``ema_model.``, ``online_model.``, ``initted``, ``step`` |
| Lightning | ``state_dict`` with ``model.``, ``ema.`` or ``model_ema.`` (LitEma leaves out the dots), ``callbacks`` |
| ``torch.compile``, FSDP | ``_orig_mod.``, ``_fsdp_wrapped_module.`` anywhere in a name |
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dexport.exporter.weights.stored import Stored, Strided
from dexport.exporter.weights.unpickle import Opaque

CONTAINERS = (
    "ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema_params",
    "model",
    "model_state_dict",
    "state_dict",
    "module",
    "online_model",
    "params",
    "net",
    "network",
    "student",
    "teacher",
)
"""Keys under which training code stores a state dict, averaged weights first; any other name of an average does too."""
AVERAGED = re.compile(r"(?<![a-z])(ema(model|s)?|modelema|swa|shadow|polyak|averag(ed?|ing))(?![a-z])", re.IGNORECASE)
CURRENT = re.compile(r"(?<![a-z])(online|current|student|collected|backup|raw)(?![a-z])", re.IGNORECASE)
"""Inside an average's own state: the weights that are averaged."""
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
PARALLEL = "module"
"""What DistributedDataParallel, AveragedModel and timm put before every name, and a network may use itself."""
BOOKKEEPING = ("n_averaged", "initted", "step", "num_updates", "updates", "decay", "optimization_step")
LISTED_PARAMETERS = "shadow_params"
ROOT = "."
REST = " + "
DEEPEST = 8
MOST_CONTAINERS = 10_000
LONGEST_LIST = 16
LONGEST_LABEL = 100
Index = Mapping[str, Stored | Strided]


@dataclass(frozen=True)
class Form:
    """One state dict of a file.

    Attributes:
        label: where it lies, keys and prefixes joined by dots; empty for the file itself. What was filled in from
            other weights, such as buffers, follows after ``REST``.
        averaged: it, or what it lies in, is named as an average.
        known: without it, the form is taken only when it is asked for.
        inside: it is a part of a state dict, by a prefix of its names.
    """

    label: str
    tensors: Index
    averaged: bool = False
    known: bool = True
    inside: bool = False

    @property
    def base(self) -> str:
        """The label without what was filled in."""
        return self.label.partition(REST)[0]

    @property
    def address(self) -> str:
        """What to write after ``FILE::``."""
        return address_of(self.label)


@dataclass(frozen=True)
class Unread:
    """An average that is there and cannot be given names."""

    label: str
    reason: str


@dataclass(frozen=True)
class Fixed:
    """Names in the network that an average may leave out."""

    buffers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Section:
    path: tuple[str, ...]
    content: Any

    @property
    def label(self) -> str:
        return _label(".".join(self.path))

    @property
    def averaged(self) -> bool:
        return any(map(is_average, self.path)) and not any(map(CURRENT.search, self.path))

    @property
    def known(self) -> bool:
        return self.averaged or all(key in CONTAINERS for key in self.path)


def find_forms(loaded: Any, fixed: Fixed) -> tuple[list[Form], list[Unread]]:
    """Every state dict in what a file holds, those to be preferred first, and the averages that have no names.

    Raises:
        ValueError: more containers than any training code writes.
    """
    forms: list[Form] = []
    unread: list[Unread] = []
    lists: list[_Section] = []
    for section in _sections(loaded):
        if isinstance(section.content, list):
            lists += [section] if section.averaged else []
            continue
        whole = {name: value for name, value in section.content.items() if isinstance(name, str)}
        tensors = {name: value for name, value in whole.items() if isinstance(value, Stored | Strided)}
        if not _without_bookkeeping(tensors):
            continue
        strange = [f"{name} is {value.kind}" for name, value in whole.items() if _is_strange(value)]
        if strange:
            unread += [Unread(section.label, strange[0])] if section.averaged else []
        else:
            forms += _variants(Form(section.label, tensors, section.averaged, section.known))
    forms.sort(key=lambda form: (form.inside, not form.label))
    raw = [form for form in forms if not form.averaged]
    averaged = [form for form in forms if form.averaged]
    for section in lists:
        named = [form for other in raw for form in _named(section, other, fixed)]
        averaged += named
        if not named:
            count = len(section.content)
            unread.append(
                Unread(section.label, f"its {count} tensors are not the parameters of the model beside it, in order")
            )
    filled = [form for one in averaged for other in raw for form in _filled(one, other)]
    return [*averaged, *filled, *raw], unread


def address_of(label: str) -> str:
    """What to write after ``FILE::`` for the form of this label."""
    return label.partition(REST)[0] or ROOT


def is_average(key: str) -> bool:
    """Whether a key or the first part of a name says so."""
    return AVERAGED.search(CAMEL.sub("_", key)) is not None


def without_dots(name: str) -> str:
    """As LitEma stores names."""
    return name.replace(".", "")


def _sections(loaded: Any) -> Iterator[_Section]:
    """Everything that holds tensors itself, with the keys that lead to it."""
    rest = deque([_Section((), loaded)] if isinstance(loaded, dict) else [])
    count = 0
    while rest:
        count += 1
        if count > MOST_CONTAINERS:
            raise ValueError("it holds more containers than any checkpoint")
        section = rest.popleft()
        content, path = section.content, section.path
        if isinstance(content, list):
            # Its first item tells most lists, which may be long, from one of tensors.
            if isinstance(content[0], Stored | Strided) and all(isinstance(v, Stored | Strided) for v in content):
                yield section
            inner = [(str(n), value) for n, value in enumerate(content[:LONGEST_LIST])]
        else:
            if any(isinstance(value, Stored | Strided) or _is_strange(value) for value in content.values()):
                yield section
            inner = [(key, value) for key, value in content.items() if isinstance(key, str)]
        if len(path) < DEEPEST:
            for key, value in inner:
                value = list(value) if isinstance(value, tuple) else value
                if isinstance(value, dict | list) and value:
                    rest.append(_Section((*path, key), value))


def _is_strange(value: Any) -> bool:
    return isinstance(value, Opaque) and value.is_tensor


def _without_bookkeeping(tensors: Index) -> dict[str, Stored | Strided]:
    return {name: t for name, t in tensors.items() if name not in BOOKKEEPING or t.shape not in ((), (1,))}


def _variants(form: Form, depth: int = 0) -> list[Form]:
    """The same weights under the names that they may have in the network: without wrappers, and the parts apart."""
    names = _unwrapped(form.tensors)
    kept = _without_bookkeeping(names)
    core = _stripped(kept)
    averages: list[Form] = []
    parts: list[Form] = []
    for part in dict.fromkeys(name.partition(".")[0] for name in core if "." in name) if depth < DEEPEST else ():
        inner = {name.partition(".")[2]: t for name, t in core.items() if name.startswith(f"{part}.")}
        label = _label(f"{form.label}.{part}" if form.label else part)
        if is_average(part) and not form.averaged:
            outer = {name: t for name, t in core.items() if not name.startswith(f"{part}.")}
            averages += _variants(Form(label, _with_dots(inner, outer), True, form.known, True), depth + 1)
        elif is_average(part) or part in CONTAINERS or CURRENT.search(part):
            averaged = form.averaged and not CURRENT.search(part)
            parts += _variants(Form(label, inner, averaged, form.known, True), depth + 1)
    without = {re.sub(rf"(^|\.){PARALLEL}\.", r"\1", name): t for name, t in core.items()}
    rest = {name: t for name, t in core.items() if not is_average(name.partition(".")[0])} if averages else {}
    whole = [core, names, rest, *([without] if len(without) == len(core) and without.keys() != core.keys() else [])]
    own = [Form(form.label, t, form.averaged, form.known, form.inside) for t in _distinct(whole)]
    return [*averages, *own, *parts]


def _distinct(choices: Sequence[Index]) -> list[Index]:
    found: list[Index] = []
    for choice in choices:
        if choice and not any(choice.keys() == other.keys() for other in found):
            found.append(choice)
    return found


def _unwrapped(tensors: Index) -> Index:
    """Names without the parts that ``torch.compile`` and FSDP insert anywhere; two that become one stay as they are."""
    renamed = {".".join(p for p in name.split(".") if p not in WRAPPERS): t for name, t in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def _stripped(tensors: Index) -> Index:
    """Names without the prefix of a parallel wrapper, which goes only when every name has it."""
    prefix = f"{PARALLEL}."
    while tensors and all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors


def _with_dots(average: Index, others: Index) -> Index:
    """LitEma's names with the dots of the weights that it averages, where they can be found."""
    tensors = _without_bookkeeping(average)
    for prefix in ("", *dict.fromkeys(f"{name.partition('.')[0]}." for name in others)):
        dotted: dict[str, str] = {}
        for name in others:
            if name.startswith(prefix):
                own = name.removeprefix(prefix)
                dotted[without_dots(own)] = "" if without_dots(own) in dotted else own
        if tensors and all(dotted.get(name) for name in tensors):
            return {dotted[name]: t for name, t in tensors.items()}
    return average


def _named(section: _Section, model: Form, fixed: Fixed) -> list[Form]:
    """A list of parameters under the names of the model whose parameters have that order and those shapes."""
    names: dict[Any, list[str]] = {}
    for name, tensor in model.tensors.items():  # tied weights are one parameter
        names.setdefault(tensor if tensor.span else name, []).append(name)
    for left_out in (frozenset[str](), fixed.buffers, fixed.buffers | fixed.frozen):
        kept = [group for group in names.values() if not _all_in(group, left_out)]
        shapes = [model.tensors[group[0]].shape for group in kept]
        if shapes == [tensor.shape for tensor in section.content]:
            found = {name: tensor for group, tensor in zip(kept, section.content, strict=True) for name in group}
            return [Form(section.label, found, averaged=True)]
    return []


def _all_in(names: Sequence[str], known: Container[str]) -> bool:
    return all(name in known for name in names)


def _filled(average: Form, model: Form) -> list[Form]:
    """An average of some weights with the rest of the model's: buffers, and what was not trained."""
    common = average.tensors.keys() & model.tensors.keys()
    if not common or model.tensors.keys() <= average.tensors.keys():
        return []
    if any(average.tensors[name].shape != model.tensors[name].shape for name in common):
        return []
    label = f"{average.label}{REST}{model.label or 'the rest'}"
    return [Form(label, {**model.tensors, **average.tensors}, True, average.known, average.inside)]


def _label(text: str) -> str:
    return text.replace("::", ":").encode("unicode_escape").decode()[:LONGEST_LABEL]
