"""Bundles with a planted fault: a copy whose graph was edited, and whose hashes are right again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from dexport.bundle import MANIFEST, MODEL, MODEL_DATA, Bundle, hash_files, load_bundle
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights

Edit = Callable[[onnx.GraphProto], None]


def plant(bundle: Path, target: Path, edit: Edit) -> Bundle:
    """A copy of a bundle with an edited graph."""
    shutil.copytree(bundle, target)
    model = onnx.load(target / MODEL)
    edit(model.graph)
    for name in (MODEL, MODEL_DATA):
        (target / name).unlink()
    onnx.save(model, target / MODEL, save_as_external_data=True, location=MODEL_DATA)
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["files"] = hash_files(target)
    (target / MANIFEST).write_text(json.dumps(manifest))
    return load_bundle(target)


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Change an initializer."""

    def edit(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == name)
        array = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    return edit


def attribute(node: str, name: str, value: object) -> Edit:
    """Change an attribute of a node."""

    def edit(graph: onnx.GraphProto) -> None:
        found = next(n for n in graph.node if n.name == node)
        kept = [a for a in found.attribute if a.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return edit


def swapped_outputs(node: str, first: int, second: int) -> Edit:
    """Swap two outputs of a node, as a wrong order of chunks would."""

    def edit(graph: onnx.GraphProto) -> None:
        found = next(n for n in graph.node if n.name == node)
        found.output[first], found.output[second] = found.output[second], found.output[first]

    return edit


def one_element(array: np.ndarray) -> np.ndarray:
    """1 % more in one place, where the magnitude is the largest."""
    array.flat[np.abs(array).argmax()] *= np.array(1.01, array.dtype)
    return array


def loud_checkpoint(path: Path, settings: Mapping[str, Any]) -> str:
    """Weights of a DiT whose second MLP works at 1e5 times the scale, and returns what it did before."""
    module = resolve(find_recipe("dit-s-2"), settings).meta_module()
    source = open_weights(None, module, seed=0)
    state = {name: source.read(name, torch.float32) for name in source.shapes}
    for name in ("blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"):
        state[name] = state[name] * 1e5
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"] / 1e5
    save_file(state, path)
    return str(path)
