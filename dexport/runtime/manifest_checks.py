"""The fields of a manifest that running a bundle depends on: there, of the right type and size, before any use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np

from dexport import limits
from dexport.bundle import MANIFEST, Bundle, pixel_shuffle, reading_manifest
from dexport.errors import InputError, UsageError
from dexport.printable import printable
from dexport.runtime.guidance import feed_of, find_rule
from dexport.runtime.inputs import accepted_of
from dexport.runtime.samplers import WITH_VARIANCE, make_sampler
from dexport.runtime.stitch import check_fractions

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
BOUNDS: Mapping[str, tuple[float, float]] = {
    "sampling.steps": (1, limits.MOST_STEPS),
    "sampling.latent_scale": (-limits.LARGEST_LATENT_SCALE, limits.LARGEST_LATENT_SCALE),
    "sampling.classes": (1, limits.MOST_CLASSES),
    "sampling.null_label": (0, limits.LARGEST_LABEL),
    "sampling.guidance.default_scale": (1, limits.LARGEST_SCALE),
    "sampling.folded.steps": (1, limits.MOST_STEPS),
    "batch.max": (1, limits.MOST_BATCH),
}
LATENT_RANK = 4
FUSED_SCALE = "cfg_scale"


def check_denoiser(bundle: Bundle) -> None:
    """Raises InputError that names the first field which a denoiser's manifest lacks, or has in another form."""
    check_sampling(bundle)
    _check(bundle, DENOISER)
    _check_tensors(bundle)
    _check_state(bundle)
    facts = bundle.manifest["sampling"]
    with reading_manifest(bundle):
        labels = accepted_of(bundle.manifest["io"]["inputs"]).get("y")
    if labels is not None and not labels.high >= max(facts["classes"] - 1, facts["null_label"] or 0):
        raise _wrong(bundle, "sampling.null_label")


def check_sampling(bundle: Bundle) -> None:
    """The same of the section ``sampling`` alone, which a bundle that joins denoisers has too."""
    _check(bundle, BUNDLE)
    facts = bundle.manifest["sampling"]
    if facts["latent_scale"] == 0:
        raise _wrong(bundle, "sampling.latent_scale")
    if facts["guidance"] is not None:
        _check(bundle, GUIDANCE)
        _check_known(bundle, "sampling.guidance.rule", lambda: find_rule(facts["guidance"]["rule"]))
    if facts["null_label"] is not None:
        if facts["guidance"] is None:
            raise _wrong(bundle, "sampling.guidance")
        if facts["classes"] is None or facts["null_label"] < facts["classes"]:
            raise _wrong(bundle, "sampling.null_label")
    if facts.get("folded") is not None:
        _check(bundle, FOLDED)
        times = facts["folded"]["times"]
        if not 0 < len(times) <= 2 * limits.MOST_STEPS or not all(_is(t, NUMBER) and _is_finite(t) for t in times):
            raise _wrong(bundle, "sampling.folded.times")
    names, classes = facts["class_names"], facts["classes"]
    if names and (len(names) != classes or not all(isinstance(name, str) for name in names)):
        raise _wrong(bundle, "sampling.class_names")
    _check_known(bundle, "sampling.sampler", lambda: make_sampler(facts["sampler"], facts["steps"]))


def check_stitched(bundle: Bundle) -> None:
    """The same of a bundle that joins denoisers, whose own facts are in its parts."""
    check_sampling(bundle)
    with reading_manifest(bundle):
        parts, fractions = zip(*bundle.stitch, strict=True)
    if len(parts) < 2:
        raise _wrong(bundle, "stitch")
    _check_known(bundle, "stitch", lambda: check_fractions(fractions))
    for part in parts:
        check_denoiser(part)
    for key in ("classes", "null_label", "latent_scale", "decoder"):
        if any(part.manifest["sampling"][key] != bundle.manifest["sampling"][key] for part in parts):
            raise _wrong(bundle, f"sampling.{key}")
    if len({tuple(part.manifest["io"]["inputs"][0]["shape"][1:]) for part in parts}) > 1:
        raise _wrong(bundle, "stitch")


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
        low, high = BOUNDS.get(path, (-math.inf, math.inf))
        if path in BOUNDS and value is not None and not low <= value <= high:
            raise _wrong(bundle, path, f"is {limits.shown(value)}, and {low:g} to {high:g} can be")


def _check_known(bundle: Bundle, path: str, use: Any) -> None:
    """Give what a field names to what knows it; a refusal is one of the manifest, not of the request."""
    try:
        use()
    except UsageError as error:
        raise _wrong(bundle, path, f"cannot be used: {error}") from error


def _check_tensors(bundle: Bundle) -> None:
    _check(bundle, {"io.inputs": (list,), "io.outputs": (list,)})
    for side in ("inputs", "outputs"):
        specs = bundle.manifest["io"][side]
        for index, spec in enumerate(specs):
            for key, kinds in TENSOR.items():
                if not isinstance(spec, dict) or not _is(spec.get(key), kinds):
                    raise _wrong(bundle, f"io.{side}[{index}].{key}")
            shape = spec["shape"]
            if len(shape) > limits.MOST_DIMENSIONS or not all(size == "B" or _is_size(size) for size in shape):
                raise _wrong(bundle, f"io.{side}[{index}].shape")
        if not specs or len({spec["name"] for spec in specs}) < len(specs):
            raise _wrong(bundle, f"io.{side}")


def _check_state(bundle: Bundle) -> None:
    """The state that goes in, what else the pipeline feeds, and the prediction that comes out."""
    facts, io = bundle.manifest["sampling"], bundle.manifest["io"]
    shape, names = io["inputs"][0]["shape"], [spec["name"] for spec in io["inputs"]]
    if len(shape) != LATENT_RANK or not all(map(_is_size, shape[1:])):
        raise _wrong(bundle, "io.inputs[0].shape")
    channels, height, width = shape[1:]
    if channels > limits.MOST_CHANNELS or height * width > limits.LARGEST_GRID:
        raise _wrong(bundle, "io.inputs[0].shape", f"is {shape}, and {limits.LARGEST_GRID:,} cells are the most")
    if channels * height * width > limits.LARGEST_STATE:
        raise _wrong(bundle, "io.inputs[0].shape", f"is {shape}, and {limits.LARGEST_STATE:,} numbers are the most")
    fused = bundle.manifest["guidance"] != "none"
    fed = {FUSED_SCALE} if fused else set()
    fed |= set(_fed(names))
    if set(names) != fed or ("y" in names) != (facts["classes"] is not None):
        raise _wrong(bundle, "io.inputs")
    out = {spec["name"]: spec["shape"] for spec in io["outputs"]}.get("out", [])
    predicted = (channels, 2 * channels) if facts["sampler"] in WITH_VARIANCE else (channels,)
    if len(out) != LATENT_RANK or out[1] not in predicted or not all(map(_is_size, out[1:])):
        raise _wrong(bundle, "io.outputs")
    with reading_manifest(bundle):
        shuffle = pixel_shuffle(facts["decoder"])
    if shuffle is not None:
        factor, tiles = shuffle
        fits = max(shuffle) <= limits.LARGEST_SHUFFLE and not channels % factor**2
        if not fits or height * factor % tiles or width * factor % tiles:
            raise _wrong(bundle, "sampling.decoder")


def _fed(names: Sequence[str]) -> list[str]:
    x = np.zeros((1, 1, 1, 1), np.float32)
    return list(feed_of(names)(x, np.zeros(1, np.float32), np.zeros(1, np.int64)))


def _is(value: Any, kinds: Kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is(value, (int,)) and 0 < value <= limits.LARGEST_STATE


def _is_finite(value: float) -> bool:
    return -limits.LARGEST_SETTING <= value <= limits.LARGEST_SETTING


def _is_range(shapes: Any) -> bool:
    return (
        isinstance(shapes, Sequence)
        and len(shapes) == 3
        and all(isinstance(shape, list) and all(_is(size, (int,)) for size in shape) for shape in shapes)
        and len({len(shape) for shape in shapes}) == 1
        and all(0 <= low <= best <= high <= limits.LARGEST_STATE for low, best, high in zip(*shapes, strict=True))
    )


def _wrong(bundle: Bundle, path: str, why: str = "") -> InputError:
    problem = f"{printable(path)} is missing, or is not what dexport writes there"
    return InputError(
        f"{bundle.path / MANIFEST} is incomplete: {problem}{f': it {why}' if why else ''}",
        hint="build the bundle again",
    )
