"""The external weights of an ONNX file, mapped into memory and given to TensorRT's parser where they lie."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from dexport.errors import InputError

_DROP_INTERVAL_S = 0.05


class MappedWeights:
    """Files of external data beside one ONNX file. The network points into them: keep this until it is built."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def load_into(self, parser: Any, model: onnx.ModelProto) -> None:
        """Give the parser the address of every initializer that lies in a file and says how long it is.

        Args:
            parser: a TensorRT ``OnnxParser`` that has loaded ``model`` and not parsed it yet.

        Raises:
            InputError: a file is missing or too short, or the parser refuses an initializer.
        """
        for initializer in model.graph.initializer:
            info = ExternalDataInfo(initializer) if uses_external_data(initializer) else None
            if info is None or not info.length:
                continue
            mapped, offset = self._map(info.location), info.offset or 0
            if offset + info.length > len(mapped):
                raise InputError(
                    f"{self._folder / info.location} has {len(mapped)} bytes; {initializer.name} takes {info.length} "
                    f"from {offset} on",
                    hint="the file is cut short: export it again",
                )
            address = np.frombuffer(mapped, np.uint8).ctypes.data + offset
            if not parser.load_initializer(initializer.name, address, info.length):
                raise InputError(
                    f"TensorRT does not take the {info.length} bytes of {initializer.name}, "
                    f"{onnx.TensorProto.DataType.Name(initializer.data_type)} {list(initializer.dims)}",
                    hint="the file does not fit its weights: export it again",
                )

    @contextlib.contextmanager
    def dropping(self) -> Iterator[None]:
        """Drop the pages that were read, again and again while the block runs.

        The builder makes copies of the weights, and what it has read would stay resident beside them. A page that is
        read again comes back from the page cache.
        """
        done = threading.Event()

        def drop() -> None:
            while not done.wait(_DROP_INTERVAL_S):
                for mapped in self._maps.values():
                    mapped.madvise(mmap.MADV_DONTNEED)

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _map(self, location: str) -> mmap.mmap:
        if location not in self._maps:
            path = self._folder / location
            try:
                with path.open("rb") as file:
                    self._maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise InputError(f"the weights {path} cannot be read: {error}", hint="export it again") from error
        return self._maps[location]
