"""The fields of a manifest that running a bundle depends on: there, and of the right type, before they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from dexport.bundle import MANIFEST, Bundle, printable
from dexport.errors import InputError

Kinds = tuple[type, ...]
NUMBER: Kinds = (int, float)
BUNDLE: Mapping[str, Kinds] = {
    "name": (str,),
    "sampling.sampler": (str,),
    "sampling.steps": (int,),
    "sampling.decoder": (str,),
    "sampling.latent_scale": NUMBER,
    "sampling.classes": (int, NoneType),
    "sampling.class_names": (list, NoneType),
    "sampling.null_label": (int, NoneType),
    "sampling.guidance": (dict, NoneType),
}
FOLDED: Mapping[str, Kinds] = {"sampling.folded.steps": (int,), "sampling.folded.times": (list,)}
GUIDANCE: Mapping[str, Kinds] = {"sampling.guidance.rule": (str,), "sampling.guidance.default_scale": NUMBER}
DENOISER: Mapping[str, Kinds] = {
    "name": (str,),
    "guidance": (str,),
    "batch.max": (int,),
    "io.inputs": (list,),
    "io.outputs": (list,),
}
TENSOR: Mapping[str, Kinds] = {"name": (str,), "dtype": (str,), "shape": (list,)}
ENGINE: Mapping[str, Kinds] = {
    "name": (str,),
    "precision.name": (str,),
    "custom_ops": (list,),
    "engine.file": (str,),
    "engine.flavour": (str,),
    "engine.version": (str,),
    "engine.targets": (list,),
    "engine.fingerprint.shapes": (dict,),
}
LATENT_RANK = 4
LARGEST_LABEL = 2**63 - 1
"""Labels are int64."""


def check_denoiser(bundle: Bundle) -> None:
    """Raises InputError that names the first field which a denoiser's manifest lacks, or has in another form."""
    _check(bundle, BUNDLE)
    _check(bundle, DENOISER)
    facts = bundle.manifest["sampling"]
    if facts["guidance"] is not None:
        _check(bundle, GUIDANCE)
    if facts["null_label"] is not None and facts["guidance"] is None:
        raise _wrong(bundle, "sampling.guidance")
    if facts["null_label"] is not None and not 0 <= facts["null_label"] <= LARGEST_LABEL:
        raise _wrong(bundle, "sampling.null_label")
    if facts.get("folded") is not None:
        _check(bundle, FOLDED)
        if not all(_is(time, NUMBER) for time in facts["folded"]["times"]):
            raise _wrong(bundle, "sampling.folded.times")
    _check_tensors(bundle)
    names, classes = facts["class_names"], facts["classes"]
    if names and (len(names) != classes or not all(isinstance(name, str) for name in names)):
        raise _wrong(bundle, "sampling.class_names")
    shape = bundle.manifest["io"]["inputs"][0]["shape"]
    if len(shape) != LATENT_RANK or not all(_is(size, (int,)) and size > 0 for size in shape[1:]):
        raise _wrong(bundle, "io.inputs[0].shape")


def check_stitched(bundle: Bundle) -> None:
    """The same of a bundle that joins denoisers, whose own facts are in its parts."""
    _check(bundle, BUNDLE)


def check_engine(bundle: Bundle) -> None:
    """The same of what is asked of an engine before it is deserialized."""
    _check(bundle, ENGINE)
    _check_tensors(bundle)
    if bundle.manifest["engine"]["file"] not in bundle.manifest["files"]:  # then its hash has not been checked
        raise _wrong(bundle, "engine.file")
    for name, shapes in bundle.manifest["engine"]["fingerprint"]["shapes"].items():
        if not _is_range(shapes):
            raise _wrong(bundle, f"engine.fingerprint.shapes.{name}")
    for index, target in enumerate(bundle.manifest["engine"]["targets"]):
        if not isinstance(target, str):
            raise _wrong(bundle, f"engine.targets[{index}]")
    for index, op in enumerate(bundle.manifest["custom_ops"]):
        if not isinstance(op, dict) or "ptx_sha256" not in op:
            raise _wrong(bundle, f"custom_ops[{index}]")


def _check(bundle: Bundle, fields: Mapping[str, Kinds]) -> None:
    for path, kinds in fields.items():
        value: Any = bundle.manifest
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise _wrong(bundle, path)
            value = value[key]
        if not _is(value, kinds):
            raise _wrong(bundle, path)


def _check_tensors(bundle: Bundle) -> None:
    _check(bundle, {"io.inputs": (list,), "io.outputs": (list,)})
    for side in ("inputs", "outputs"):
        specs = bundle.manifest["io"][side]
        for index, spec in enumerate(specs):
            for key, kinds in TENSOR.items():
                if not isinstance(spec, dict) or not _is(spec.get(key), kinds):
                    raise _wrong(bundle, f"io.{side}[{index}].{key}")
            if not all(size == "B" or _is(size, (int,)) for size in spec["shape"]):
                raise _wrong(bundle, f"io.{side}[{index}].shape")
        if not specs:
            raise _wrong(bundle, f"io.{side}")


def _is(value: Any, kinds: Kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_range(shapes: Any) -> bool:
    return (
        isinstance(shapes, Sequence)
        and len(shapes) == 3
        and all(isinstance(shape, list) and all(_is(size, (int,)) for size in shape) for shape in shapes)
        and len({len(shape) for shape in shapes}) == 1
    )


def _wrong(bundle: Bundle, path: str) -> InputError:
    return InputError(
        f"{bundle.path / MANIFEST} is incomplete: {printable(path)} is missing, or is not what dexport writes there",
        hint="build the bundle again",
    )
