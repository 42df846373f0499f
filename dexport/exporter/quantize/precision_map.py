"""A precision map: which scheme each layer has, as a file says it and as a build resolves it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dexport.bundle import MANIFEST
from dexport.errors import InputError, UsageError
from dexport.exporter.pytorch.module_path import inside
from dexport.exporter.quantize.layers import NetworkLayers
from dexport.exporter.quantize.schemes import FLOAT, INT8, LOW_BITS, SCHEMES

PrecisionMap = Mapping[str, str]
"""Module path, or glob pattern of module paths -> scheme."""
FORM = 'a JSON object such as {"blocks.*": "int4", "blocks.0.attn.qkv": "int8"}, or the manifest.json of a bundle'


def read_map(path: str | Path) -> dict[str, str]:
    """A map from a JSON file, from a bundle's ``manifest.json``, or from the folder of a bundle.

    Raises:
        UsageError: no such file.
        InputError: something else than a map.
    """
    file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UsageError(f"--quantize map={path} does not exist", hint=f"give {FORM}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--quantize map={path} is not readable JSON: {error}", hint=f"give {FORM}") from error
    found = _map_of_manifest(document, path) if isinstance(document, dict) and "schema" in document else document
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"--quantize map={path} is no map from layers to schemes", hint=f"give {FORM}")
    return found


def _map_of_manifest(manifest: Mapping[str, Any], path: str | Path) -> Any:
    """That of the main network, the first."""
    networks = manifest.get("networks")
    first = next(iter(networks.values()), None) if isinstance(networks, dict) else None
    precision = first.get("precision") if isinstance(first, dict) else None
    if not isinstance(precision, dict) or "layers" not in precision:
        raise InputError(
            f"{path} is a manifest without a precision map, or one of an older dexport", hint="build the bundle again"
        )
    return precision["layers"]


def resolve_map(
    asked: PrecisionMap, layers: NetworkLayers, exclude: Collection[str], already_ternary: Collection[str] = ()
) -> dict[str, str]:
    """The scheme of every layer.

    A name beats patterns, and a later pattern an earlier one. A pattern leaves excluded layers in floating point, and
    gives convolutions larger than 1x1, which have no INT4 or ternary form, INT8 instead.

    Args:
        exclude: patterns of the layers that only their own name quantises.
        already_ternary: layers that are ternary by construction; a map may say so, and nothing else.

    Raises:
        UsageError: unknown layers or schemes, or a scheme that a layer cannot have.
    """
    for name, scheme in asked.items():
        if scheme not in SCHEMES:
            near = difflib.get_close_matches(scheme, SCHEMES, n=1)
            raise UsageError(
                f"precision map: {name!r} has the unknown scheme {scheme!r}",
                hint=f"did you mean {near[0]}?" if near else f"choose from {', '.join(SCHEMES)}",
            )
        if not any(inside(path, name) for path in (*layers, *already_ternary)):
            raise UsageError(f"precision map: no layer is called {name!r}", hint=_near(name, layers))
        if name in already_ternary and scheme not in LOW_BITS[1:]:
            raise UsageError(f"precision map: {name} is ternary by construction", hint="build with --quantize none")
        if name in layers and layers[name].convolution and scheme in LOW_BITS:
            raise UsageError(
                f"precision map: {name} is a convolution, which cannot be {scheme}", hint="choose float, int8 or w8a8"
            )
    return {path: _scheme(path, asked, layers, exclude) for path in layers}


def _scheme(path: str, asked: PrecisionMap, layers: NetworkLayers, exclude: Collection[str]) -> str:
    if path in asked:
        return asked[path]
    matching = [scheme for pattern, scheme in asked.items() if inside(path, pattern)]
    if not matching or any(inside(path, pattern) for pattern in exclude):
        return FLOAT
    return INT8 if layers[path].convolution and matching[-1] in LOW_BITS else matching[-1]


def _near(name: str, layers: NetworkLayers) -> str:
    near = difflib.get_close_matches(name, layers, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"layers are called like {', '.join([*layers][:4])}"
