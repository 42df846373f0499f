"""Readers of ONNX files that others may have written, alone and in a bundle whose hashes are right."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from click.testing import CliRunner
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

import dexport
from dexport.bundle import MANIFEST, MODEL, MODEL_DATA, hash_files, load_bundle
from dexport.cli import main
from dexport.errors import InputError
from dexport.onnx_reader import OnnxFile
from dexport.validate.read_graph import read_graph
from tools.mutate import NUMBERS, TEXTS, Rng, damaged

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2}
ENDS = (0, 1, 2, 3, 4)
RUN_SHARE = 0.02
"""Of the bundles, which are validated and compared too: that takes about a second each."""
COMMANDS = (("validate", "--level", "forward", "--no-record"), ("diff",), ("info",))


def changed_graph(rng: Rng, content: bytes) -> bytes:
    """An ONNX file in which a few fields have another value, are missing, or have moved."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, field = rng.choice(list(_fields(model)))
        with contextlib.suppress(ValueError, TypeError):  # a value that protobuf does not take
            _change(rng, holder, field)
    return model.SerializeToString()


def _fields(message: Message) -> Any:
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for item in value if field.is_repeated else (value,):
                yield from _fields(item)


def _change(rng: Rng, holder: Message, field: Any) -> None:
    value = getattr(holder, field.name)
    if field.is_repeated:
        index = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                del value[index]
            case 1 if field.message_type is not None:
                value.add().CopyFrom(rng.choice(value))
            case 2 if field.message_type is not None:
                value[index].CopyFrom(rng.choice(value))
            case _ if field.message_type is None:
                value[index] = _scalar(rng, value[index])
    elif field.message_type is not None or rng.random() < 0.3:
        holder.ClearField(field.name)
    else:
        setattr(holder, field.name, _scalar(rng, value))


def _scalar(rng: Rng, value: Any) -> Any:
    if isinstance(value, bytes):
        return damaged(rng, value[:4096]) + value[4096:]
    if isinstance(value, str):
        return rng.choice((*TEXTS[:4], *TEXTS[5:6], "Loop", "If", "DexTMSA", "x", "y", value + "x"))
    return rng.choice(NUMBERS[:11]) if isinstance(value, int) else float(rng.choice(NUMBERS))


class OnnxFiles:
    """Graphs with functions, subgraphs and external data: bounded, checked, read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODEL
        (folder / "model.onnx.data").write_bytes(bytes(64))
        outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "model.onnx.data"), ("offset", "16"), ("length", "16")):
            outside.external_data.add(key=key, value=value)
        value_of = helper.make_tensor_value_info
        branch = helper.make_graph(
            [helper.make_node("Identity", ["w"], ["o"])], "branch", [], [value_of("o", TensorProto.FLOAT, [4])]
        )
        nodes = [
            helper.make_node("F", ["x"], ["a"], domain="d"),
            helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=branch),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [value_of("x", TensorProto.FLOAT, ["B", 4])],
            [value_of("y", TensorProto.FLOAT, ["B", 4])],
            [outside, numpy_helper.from_array(np.array(True), "c")],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("d", 1)]
        inner = helper.make_function("d", "G", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets)
        calls = [helper.make_node("G", ["x"], ["h"], domain="d"), helper.make_node("G", ["h"], ["y"], domain="d")]
        outer = helper.make_function("d", "F", ["x"], ["y"], calls, opsets)
        model = helper.make_model(graph, opset_imports=opsets, functions=[inner, outer], ir_version=10)
        self.good = model.SerializeToString()

    def __call__(self, rng: Rng) -> None:
        content = damaged(rng, self.good) if rng.random() < 0.4 else changed_graph(rng, self.good)
        self.path.write_bytes(content)
        with contextlib.suppress(ValueError):
            file = OnnxFile(content)
            file.check_expansion()
            file.external_data()
        read_graph(self.path)


@functools.cache
def _files_of_a_bundle() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "good"
        dexport.build("dit-fashion", built, settings=NARROW, profile="ci", parity=False)
        return {name: (built / name).read_bytes() for name in (MANIFEST, MODEL, MODEL_DATA)}


class OnnxBundles:
    """A denoiser's bundle with another graph in it, opened, read, and now and then run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bundle"
        self.folder.mkdir()
        files = _files_of_a_bundle()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        self.good, self.manifest = files[MODEL], json.loads(files[MANIFEST])

    def __call__(self, rng: Rng) -> None:
        content = damaged(rng, self.good) if rng.random() < 0.2 else changed_graph(rng, self.good)
        (self.folder / MODEL).write_bytes(content)
        (self.folder / MANIFEST).write_text(json.dumps(self.manifest | {"files": hash_files(self.folder)}))
        bundle = load_bundle(self.folder)
        read_graph(bundle.network.model_path())
        if rng.random() < RUN_SHARE:
            command, *options = rng.choice(COMMANDS)
            result = CliRunner().invoke(main, [command, str(self.folder), *options])
            assert result.exit_code in ENDS, f"{command} {result.exit_code}: {result.output}\n{result.exception!r}"
            if result.exit_code in (2, 3, 4):
                raise InputError(result.stderr)
