"""A bundle as models of NVIDIA's Triton Inference Server: its graphs, and its program, which makes pictures.

    DIR/
      NAME/                a graph: ONNX Runtime, or TensorRT where the bundle has a plan of it
        config.pbtxt
        1/model.onnx, model.onnx.data
      NAME_pipeline/       labels and seeds in, pictures out: Python backend, :mod:`dexport.runtime.triton_model`
        config.pbtxt
        1/model.py, bundle/

The graphs of the first role are models of their own: ``NAME``, with the number of the network and the name of the graph
where there are several. A graph with an input without dimensions, which Triton does not serve, is in the pipeline only.
Each model is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dexport.bundle import MODEL, MODEL_DATA, Draft, Network, copy_bundle, load_bundle, reading_manifest
from dexport.files import open_regular, writing_to
from dexport.runtime.engine_checks import read_facts
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES

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
    "bool": "TYPE_BOOL",
}
NUMBERS = {int: "int32", float: "float32"}
"""Types of settings."""
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
        left_out: names of graphs that Triton cannot serve on their own, and why.
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
    graphs = {
        model: (network, graph)
        for network in next(iter(bundle.roles.values()))
        for graph in network.graphs
        for model in ["_".join([name, *_suffix(network, graph)])]
    }
    with reading_manifest(bundle):
        left_out = {model: reason for model, each in graphs.items() if (reason := _why_not(*each))}
        configs = {model: graph_config(model, *each) for model, each in graphs.items() if model not in left_out}
        pipeline = name + PIPELINE
        configs[pipeline] = pipeline_config(pipeline, OpenProgram(bundle))
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
                    _copy_model(*graphs[model], version)
        for draft in drafts.values():
            draft.publish()
    return Models([draft.output for draft in drafts.values()], left_out)


def graph_config(name: str, network: Network, graph: str) -> str:
    """The configuration of a graph as it is: the names, types and shapes of its ports."""
    ports, batch = network.graphs[graph], network.manifest["batch"]
    lines = [
        f'name: "{name}"',
        'platform: "tensorrt_plan"' if _plan(network, graph) else 'platform: "onnxruntime_onnx"',
        f"max_batch_size: {batch['max']}",
        *(_tensor("input", port.name, port.dtype, port.shape) for port in ports.inputs),
        *(_tensor("output", port.name, port.dtype, port.shape) for port in ports.outputs),
        _batching(batch["opt"]),
    ]
    return MARK + "\n".join(lines) + "\n"


def pipeline_config(name: str, program: OpenProgram) -> str:
    """The configuration of the program: one row per picture, and its settings that are numbers.

    Raises:
        UsageError: it makes no pictures.
    """
    program.check_pictures()
    first = next(iter(program.roles.values()))
    inputs = ["label"] * (program.classes is not None) + ["seed"]
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {min(network.manifest['batch']['max'] for network in first)}",
        *(_tensor("input", each, "int64", ["B", 1]) for each in inputs),
        *(
            _tensor("input", setting, NUMBERS[kind], ["B", 1], optional=True)
            for setting, kind in program.program.numbers().items()
        ),
        _tensor("output", "image", "uint8", ["B", *program.makes[PICTURES]]),
        _batching(),
        "instance_group [ { count: 1, kind: KIND_CPU } ]",
        "# cpu, cuda or tensorrt",
        _parameter("provider", "cpu"),
        "# A PEM file on the server: the public key that must have signed the bundle. Empty: none.",
        _parameter("require_signature", ""),
    ]
    return MARK + "\n".join(lines) + "\n"


def _suffix(network: Network, graph: str) -> list[str]:
    """What tells a graph from the others of its role."""
    _, _, number = network.name.partition(".")
    return [part for part in (number, "" if graph == network.main_graph else graph) if part]


def _plan(network: Network, graph: str) -> Path | None:
    """The plan that Triton can run: it has no backend for TensorRT-RTX."""
    engine: Mapping[str, Any] | None = network.entry(graph)["engine"]
    if not engine or engine["flavour"] != "tensorrt":
        return None
    return read_facts(network, graph).plan


def _copy_model(network: Network, graph: str, version: Path) -> None:
    if plan := _plan(network, graph):
        shutil.copyfile(plan, version / "model.plan")
        return
    shutil.copyfile(network.model_path(graph), version / MODEL)
    if network.file(MODEL_DATA) in network.bundle.manifest["files"]:
        shutil.copyfile(network.path / MODEL_DATA, version / MODEL_DATA)


def _why_not(network: Network, graph: str) -> str:
    inputs = network.graphs[graph].inputs
    scalars = [port.name for port in inputs if not port.shape]
    if scalars:
        return f"Triton serves no input without dimensions, as its {', '.join(scalars)} is"
    fixed = {size for port in inputs if isinstance(size := port.shape[0], int)}
    if fixed:
        return f"Triton sends batches of any size, and its batch is fixed at {max(fixed)}"
    least = network.manifest["batch"]["min"]
    if least > 1 and _plan(network, graph):
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
