"""A bundle as models of NVIDIA's Triton Inference Server: the denoiser as it is, and a pipeline that makes pictures.

    DIR/
      NAME/                the denoiser: ONNX Runtime, or TensorRT where the bundle has a plan of it
        config.pbtxt
        1/model.onnx, model.onnx.data
      NAME_pipeline/       labels and seeds in, pictures out: Python backend, :mod:`dexport.runtime.triton_model`
        config.pbtxt
        1/model.py, bundle/

A stitched bundle has one denoiser per part, ``NAME_PART``. A graph with fused guidance has a scale without dimensions,
which Triton does not serve: it is in the pipeline only. Each model is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dexport.bundle import (
    DECODER,
    MODEL,
    MODEL_DATA,
    Bundle,
    Draft,
    copy_bundle,
    load_bundle,
    pixel_shuffle,
    reading_manifest,
)
from dexport.errors import InputError, UsageError
from dexport.files import open_regular, writing_to

CONFIG = "config.pbtxt"
MARK = "# Written by `dexport pack --triton`.\n"
VERSION = "1"
PIPELINE = "_pipeline"
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
}
QUEUE_MICROSECONDS = 1000
"""How long a request waits for others that can join its batch."""
MODEL_PY = '''\
"""Labels and seeds in, pictures out, from the bundle beside this file. Needs dexport and onnxruntime."""

from dexport.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Models:
    """What was written.

    Attributes:
        folders: of the models, the pipeline last.
        left_out: names of denoisers that Triton cannot serve on their own, and why.
    """

    folders: list[Path]
    left_out: Mapping[str, str]


def pack_for_triton(path: str | Path, repository: Path, *, force: bool = False) -> Models:
    """Write a bundle's models into a model repository.

    Args:
        path: the bundle's folder; its hashes are checked. The models are named after it.
        repository: is made where there is none; other models in it stay.
        force: replace models that were written before.

    Raises:
        UsageError: a model of that name is there, or the bundle has no decoder.
        InputError: not a bundle, or one that makes no pictures.
        MachineError: the disk is full or cannot be written.
    """
    bundle = load_bundle(path)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", bundle.path.absolute().name)
    with reading_manifest(bundle):
        denoisers = {name: bundle}
        if bundle.stitch:
            denoisers = {f"{name}_{part.path.name}": part for part, _ in bundle.stitch}
        left_out = {model: reason for model, part in denoisers.items() if (reason := _why_not(part))}
        configs = {model: denoiser_config(model, part) for model, part in denoisers.items() if model not in left_out}
        pipeline = name + PIPELINE
        configs[pipeline] = pipeline_config(pipeline, bundle)
    with contextlib.ExitStack() as stack:
        drafts = {
            model: stack.enter_context(Draft(repository / model, force=force, replaceable=_is_ours))
            for model in configs
        }
        for model, draft in drafts.items():
            draft.write_text(CONFIG, configs[model])
            with writing_to(draft.path):
                version = draft.path / VERSION
                version.mkdir()
                if model == pipeline:
                    draft.write_text(f"{VERSION}/model.py", MODEL_PY)
                    copy_bundle(bundle, version / "bundle")
                else:
                    _copy_model(denoisers[model], version)
        for draft in drafts.values():
            draft.publish()
    return Models([draft.output for draft in drafts.values()], left_out)


def denoiser_config(name: str, bundle: Bundle) -> str:
    """The configuration of a network as it is: the names, types and shapes of its manifest."""
    io, batch = bundle.manifest["io"], bundle.manifest["batch"]
    lines = [
        f'name: "{name}"',
        'platform: "tensorrt_plan"' if _plan(bundle) else 'platform: "onnxruntime_onnx"',
        f"max_batch_size: {batch['max']}",
        *(_tensor("input", spec["name"], spec["dtype"], spec["shape"]) for spec in io["inputs"]),
        *(_tensor("output", spec["name"], spec["dtype"], spec["shape"]) for spec in io["outputs"]),
        _batching(batch["opt"]),
    ]
    return MARK + "\n".join(lines) + "\n"


def pipeline_config(name: str, bundle: Bundle) -> str:
    """The configuration of the pipeline: one row per picture."""
    facts = bundle.manifest.get("sampling")
    if not facts:
        raise InputError(f"{bundle.path} makes no pictures: it holds no denoiser", hint="build one, such as dit-xl-2")
    parts = [part for part, _ in bundle.stitch] or [bundle]
    inputs = ["label"] * (facts["classes"] is not None) + ["seed"]
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {min(part.manifest['batch']['max'] for part in parts)}",
        *(_tensor("input", each, "int64", ["B", 1]) for each in inputs),
        _tensor("input", "cfg_scale", "float32", ["B", 1], optional=True),
        _tensor("input", "steps", "int32", ["B", 1], optional=True),
        _tensor("output", "image", "uint8", ["B", *picture_shape(bundle, parts)]),
        _batching(),
        "instance_group [ { count: 1, kind: KIND_CPU } ]",
        "# cpu, cuda or tensorrt",
        _parameter("provider", "cpu"),
        "# A PEM file on the server: the public key that must have signed the bundle. Empty: none.",
        _parameter("require_signature", ""),
    ]
    return MARK + "\n".join(lines) + "\n"


def picture_shape(bundle: Bundle, parts: Sequence[Bundle]) -> tuple[int, int, int]:
    """(H, W, C) of the pictures that a bundle makes.

    Raises:
        UsageError: it makes latents and brings no decoder.
    """
    channels, height, width = parts[0].manifest["io"]["inputs"][0]["shape"][1:]
    kind = bundle.manifest["sampling"]["decoder"]
    if kind == "none":
        return height, width, channels
    if shuffle := pixel_shuffle(kind):
        factor, _ = shuffle
        return height * factor, width * factor, channels // factor**2
    decoders = [each.parts[DECODER] for each in (bundle, *parts) if DECODER in each.parts]
    if not decoders:
        raise UsageError(f"{bundle.path} makes latents and has no decoder", hint="build it again with --with-decoder")
    io = decoders[0].manifest["io"]
    factor = io["outputs"][0]["shape"][2] // io["inputs"][0]["shape"][2]
    return height * factor, width * factor, io["outputs"][0]["shape"][1]


def _plan(bundle: Bundle) -> Path | None:
    """The plan that Triton can run: it has no backend for TensorRT-RTX."""
    engine: Mapping[str, Any] | None = bundle.manifest["engine"]
    if not engine or engine["flavour"] != "tensorrt":
        return None
    if engine["file"] not in bundle.manifest["files"]:
        raise ValueError(f"{engine['file']} is not in it")
    return bundle.path / engine["file"]


def _copy_model(bundle: Bundle, version: Path) -> None:
    if plan := _plan(bundle):
        shutil.copyfile(plan, version / "model.plan")
        return
    for name in (MODEL, MODEL_DATA):
        if name in bundle.manifest["files"]:
            shutil.copyfile(bundle.path / name, version / name)


def _why_not(bundle: Bundle) -> str:
    inputs = bundle.manifest["io"]["inputs"]
    scalars = [spec["name"] for spec in inputs if not spec["shape"]]
    if scalars:
        return f"Triton serves no input without dimensions, as its {', '.join(scalars)} is"
    fixed = {size for spec in inputs if isinstance(size := spec["shape"][0], int)}
    if fixed:
        return f"Triton sends batches of any size, and its batch is fixed at {max(fixed)}"
    least = bundle.manifest["batch"]["min"]
    if least > 1 and _plan(bundle):
        return f"Triton sends batches from 1, and its engine takes {least} or more"
    return ""


def _tensor(kind: str, name: str, dtype: str, shape: Sequence[int | str], *, optional: bool = False) -> str:
    """An input or output; its first dimension is the batch, which Triton leaves out."""
    dims = list(shape[1:])
    fields = [f'name: "{name}"', f"data_type: {TYPES[dtype]}", f"dims: {dims or [1]}"]
    if not dims:  # one number per row
        fields.append("reshape: { shape: [] }")
    if optional:
        fields.append("optional: true")
    return f"{kind} [ {{ {', '.join(fields)} }} ]"


def _batching(preferred: int | None = None) -> str:
    fields = [f"preferred_batch_size: [{preferred}]"] * (preferred is not None)
    return f"dynamic_batching {{ {', '.join([*fields, f'max_queue_delay_microseconds: {QUEUE_MICROSECONDS}'])} }}"


def _parameter(key: str, value: str) -> str:
    return f'parameters [ {{ key: "{key}", value: {{ string_value: "{value}" }} }} ]'


def _is_ours(folder: Path) -> bool:
    try:
        with open_regular(folder / CONFIG) as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False
