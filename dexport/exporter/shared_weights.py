"""Several graphs over one weights file: what a file holds already is not written again, whatever it is called."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from dexport.exporter.passes.lazy import static_shape

LARGEST_INSIDE = 256
"""Bytes of a tensor that lies in the graph itself, as onnx-ir has it."""
LOCATION, OFFSET, LENGTH = "location", "offset", "length"
Place = tuple[int, str]
"""Offset and name of a tensor in the file."""


class SharedWeights:
    """A file of weights that graphs are added to. Equal content decides, so that it grows by nothing else.

    Args:
        graph: the ONNX file whose weights the file holds already.
        file: beside it.
    """

    def __init__(self, graph: Path, file: Path) -> None:
        self._file = file
        self._places: defaultdict[int, list[Place]] = defaultdict(list)
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries.get(LOCATION) == file.name:
                self._places[int(entries[LENGTH])].append((int(entries[OFFSET]), tensor.name))

    def save(self, model: ir.Model, path: Path) -> None:
        """Save another graph beside the file; at most one of its weights is in memory.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        for value in _large(model):
            tensor = value.const_value
            assert tensor is not None and value.name is not None
            content = tensor.tobytes()
            offset = self._find(content, value.name)
            if offset is None:
                offset = self._append(content, value.name)
            value.const_value = ir.ExternalTensor(
                self._file.name,
                offset,
                len(content),
                tensor.dtype,
                shape=ir.Shape(static_shape(tensor)),
                name=value.name,
                base_dir=self._file.parent,
            )
        ir.save(model, path)

    def _find(self, content: bytes, name: str) -> int | None:
        """The offset of equal bytes; those of the same name are looked at first."""
        places = sorted(self._places.get(len(content), ()), key=lambda place: place[1] != name)
        if not places:
            return None
        with self._file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                return next((at for at, _ in places if view[at : at + len(content)] == content), None)
            finally:
                view.release()

    def _append(self, content: bytes, name: str) -> int:
        with self._file.open("ab") as file:
            offset = file.tell()
            file.write(content)
        self._places[len(content)].append((offset, name))
        return offset


def _large(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes > LARGEST_INSIDE:
                yield value
