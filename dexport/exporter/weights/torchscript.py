"""The state dict of a TorchScript file, without loading the script.

The index describes a tree of objects; the script beside it says, in lines of literals, which of a class's attributes
are parameters and buffers. Both are read as data: no class is made, no method is called.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from dexport.exporter.weights.stored import Strided
from dexport.exporter.weights.torch_file import ZipFile, reading
from dexport.exporter.weights.torch_names import NAMES, find
from dexport.exporter.weights.unpickle import ForbiddenError, Instance, Maker, Opaque
from dexport.exporter.weights.zip_archive import ZipArchive

CONSTANTS = "constants.pkl"
LARGEST_SCRIPT = 16 << 20
MOST_MODULES = 100_000
DEEPEST = 100
CLASS = re.compile(r"^class (\w+)\(.*\):$")
TENSORS = re.compile(r"^  (?:__parameters__|__buffers__) = \[(.*)\]$")
LITERAL = re.compile(r'"([^"]*)"')
LITERALS = "torch.jit._pickle."
"""``build_intlist`` and its like, which give back the list that they are given."""


def is_torchscript(archive: ZipArchive) -> bool:
    """Whether ``torch.jit.save`` wrote the archive."""
    return CONSTANTS in archive.members


def state_dict(file: ZipFile) -> dict[str, Strided]:
    """Name -> view, as ``torch.jit.load(...).state_dict()`` names them.

    Raises:
        InputError: the file is damaged, or nested as no network is.
    """
    found: dict[str, Strided] = {}
    declared: dict[str, frozenset[str]] = {}
    with reading(file.file):
        root = file.load(_find)
        if not isinstance(root, Instance):
            raise ValueError("it holds no module")
        rest: list[tuple[str, Instance, int]] = [("", root, 0)]
        seen = 0
        while rest:
            seen += 1
            if seen > MOST_MODULES:  # they may share each other, so that few make any number of names
                raise ValueError("it has more modules than any network")
            prefix, module, depth = rest.pop()
            names = _declared(file, module.of, declared)
            for name, value in module.attributes.items():
                if isinstance(value, Instance) and depth < DEEPEST:
                    rest.append((f"{prefix}{name}.", value, depth + 1))
                elif isinstance(value, Strided) and name in names:
                    found[prefix + name] = value
    return found


def _find(module: str, name: str) -> Any:
    if module == "__torch__" or module.startswith("__torch__."):
        return Maker(partial(_instance, f"{module}.{name}"))
    if f"{module}." == LITERALS:
        return Maker(lambda *_: Opaque("a list"))
    if f"{module}.{name}" in NAMES or module.split(".")[0] == "torch":
        return find(module, name)
    raise ForbiddenError(f"{module}.{name}")


def _instance(of: str, *_: Any) -> Instance:
    return Instance(of)


def _declared(file: ZipFile, of: str, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """The names of a class's parameters and buffers."""
    if of not in known:
        path = of.rpartition(".")[0]
        script = file.archive.members.get(f"code/{path.replace('.', '/')}.py".lower())
        if script is None:
            raise ValueError(f"the script of {of} is not there")
        known.setdefault(of, frozenset())
        source = file.archive.unpacked(script, LARGEST_SCRIPT).decode("utf-8")
        current = ""
        for line in source.splitlines():
            begins, lists = CLASS.match(line), TENSORS.match(line)
            if begins:
                current = f"{path}.{begins[1]}"
            elif lists:
                known[current] = known.get(current, frozenset()) | frozenset(LITERAL.findall(lists[1]))
    return known[of]
