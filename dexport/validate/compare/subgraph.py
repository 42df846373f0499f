"""Parts of an exported graph, cut at named values and run on given ones."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dexport.bundle import MODEL, MODEL_DATA
from dexport.exporter.passes.emulate_low_precision import EmulateLowPrecision
from dexport.exporter.passes.precision import TORCH_TYPES
from dexport.files import writing_to
from dexport.runtime.session import OnnxSession
from dexport.validate.read_graph import read_graph

GIVEN = "/given"
"""Suffix of an input that stands for a value of the whole graph."""


class CutGraph:
    """An exported graph whose values can be given and asked for by name.

    Half precision computes with every rounding explicit; a value that the file stores in half precision is rounded to
    it, whether it is given or computed.

    Args:
        folder: where the external data of ``model`` lies.

    Attributes:
        model: the graph as in the file.
        values: every node's output, by name.
    """

    def __init__(self, model: ir.Model, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.values = {str(value.name): value for node in model.graph for value in node.outputs}
        self._executed = model.clone()
        for value in (value for node in self._executed.graph for value in node.outputs):
            if value.dtype is not None:  # a clone shares its types with the original, and the pass changes them
                value.type = ir.TensorType(value.dtype)
        EmulateLowPrecision()(self._executed)

    @classmethod
    def load(cls, path: Path) -> CutGraph:
        """The graph of a file."""
        return cls(read_graph(path), path.parent)

    def part(self, wanted: Sequence[str], cuts: Collection[str]) -> Part:
        """What computes ``wanted``, with every reader of a value in ``cuts`` reading an input in its place."""
        graph = self._executed.graph.clone()
        values = ir.convenience.create_value_mapping(graph)
        for name in cuts:
            value = values.get(name)
            if value is None or not value.uses():
                continue
            given = ir.Value(name=name + GIVEN, type=value.type, shape=value.shape)
            graph.inputs.append(given)
            readers = [(use.node, use.idx) for use in value.uses()]
            for node, index in readers:
                node.replace_input_with(index, given)
        graph = ir.convenience.extract(graph, list(graph.inputs), [values[name] for name in wanted])
        for value in list(graph.inputs):
            if not value.uses() and value not in graph.outputs:
                graph.inputs.remove(value)
        functions = [function.clone() for function in self._executed.functions.values()]
        model = ir.Model(graph, ir_version=self._executed.ir_version, functions=functions)
        return Part(self, model, tuple(wanted))

    def as_stored(self, name: str, array: np.ndarray) -> np.ndarray:
        """A float32 value as the file would hold it: rounded to half precision where its type is one."""
        value = self.values.get(name)
        if value is None or value.dtype is None or value.dtype not in TORCH_TYPES:
            return array
        with np.errstate(over="ignore"):
            return array.astype(value.dtype.numpy()).astype(np.float32)


class Part:
    """A part of a graph; nothing is loaded before :meth:`run`, and nothing is kept after it.

    Attributes:
        wanted: names of the values that it computes.
        needs: names of the values of the whole graph that it has to be given, its inputs among them.
    """

    def __init__(self, whole: CutGraph, model: ir.Model, wanted: tuple[str, ...]) -> None:
        self.wanted = wanted
        self.needs = frozenset(str(value.name).removesuffix(GIVEN) for value in model.graph.inputs)
        self._whole = whole
        self._model = model

    def run(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the wanted values from those in ``needs``; others are ignored."""
        feeds = {}
        for value in self._model.graph.inputs:
            name = str(value.name).removesuffix(GIVEN)
            feeds[str(value.name)] = self._whole.as_stored(name, given[name])
        results = self._compute(feeds)
        return {name: self._whole.as_stored(name, results[name]) for name in self.wanted}

    def _compute(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        weights = self._model.graph.initializers.values()
        if not any(isinstance(weight.const_value, ir.LazyTensor) for weight in weights):
            content = ir.to_proto(self._model).SerializeToString()
            return OnnxSession(content, data_folder=self._whole.folder)(**feeds)
        # Weights that are computed when they are read: written one by one, and mapped from there.
        with tempfile.TemporaryDirectory(prefix="dexport-part-") as folder, writing_to(Path(folder)):
            ir.save(self._model, Path(folder) / MODEL, external_data=MODEL_DATA)
            return OnnxSession(Path(folder) / MODEL)(**feeds)
