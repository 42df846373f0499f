"""Faults planted into a built bundle, whose hashes are then made right again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dexport.bundle import MANIFEST, hash_files


def planted(bundle: Path, to: Path, factor: float = 1.01, weight: str = "") -> Path:
    """A copy in which the largest weight, or the first one with ``weight`` in its name, is off by a factor."""
    shutil.copytree(bundle, to)
    model = ir.load(to / "model.onnx")
    values = [value for name, value in model.graph.initializers.items() if weight in name]
    chosen = values[0] if weight else max(values, key=lambda value: value.const_value.size)
    array = np.asarray(chosen.const_value.numpy()) * factor
    tensors = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    for name, value in model.graph.initializers.items():
        value.const_value = ir.tensor(array.astype(tensors[name].dtype) if value is chosen else tensors[name].copy())
    (to / "model.onnx.data").unlink()
    ir.save(model, to / "model.onnx", external_data="model.onnx.data")
    rehash(to)
    return to


def rehash(bundle: Path) -> None:
    """Make the hashes of a changed bundle right."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "files": hash_files(bundle)}))
