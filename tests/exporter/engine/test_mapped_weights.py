"""Weights are given to a parser where they lie in the file, and do not stay resident."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dexport.errors import InputError
from dexport.exporter.engine.mapped_weights import MappedWeights

LARGE = 16 << 20


class Parser:
    """Keeps what it is given, as TensorRT's parser does: addresses, not bytes."""

    def __init__(self, accepts: bool = True) -> None:
        self.accepts = accepts
        self.given: dict[str, tuple[int, int]] = {}

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        self.given[name] = (data, size)
        return self.accepts

    def read(self, name: str) -> bytes:
        return ctypes.string_at(*self.given[name])


@pytest.fixture
def model(tmp_path: Path) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(random.standard_normal((7, 3)).astype(np.float16), "half"),
        numpy_helper.from_array(random.integers(0, 256, LARGE, dtype=np.uint8), "large"),
        helper.make_tensor("four_bits", TensorProto.INT4, [5], b"\x78\x10\x0f", raw=True),
        numpy_helper.from_array(np.zeros(0, np.float32), "nothing"),
    ]
    proto = helper.make_model(helper.make_graph([], "weights", [], [], tensors))
    onnx.save(
        proto,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return onnx.load(tmp_path / "model.onnx", load_external_data=False)


def test_every_initializer_is_given_as_it_was_stored(model: onnx.ModelProto, tmp_path: Path) -> None:
    parser, weights = Parser(), MappedWeights(tmp_path)
    weights.load_into(parser, model)
    stored = onnx.load(tmp_path / "model.onnx")
    expected = {tensor.name: tensor.raw_data for tensor in stored.graph.initializer if tensor.raw_data}
    assert set(expected) == {"half", "large", "four_bits"}
    assert {name: parser.read(name) for name in parser.given} == expected
    with weights.dropping():
        time.sleep(0.2)
        assert {name: parser.read(name) for name in parser.given} == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_read_does_not_stay_resident(model: onnx.ModelProto, tmp_path: Path) -> None:
    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        found = re.search(rf"{re.escape(str(tmp_path))}/model\.onnx\.data\n(?:.*\n)*?Rss: +(\d+) kB", text)
        assert found
        return int(found[1]) << 10

    parser, weights = Parser(), MappedWeights(tmp_path)
    weights.load_into(parser, model)
    parser.read("large")
    assert resident() >= LARGE
    with weights.dropping():
        deadline = time.monotonic() + 10
        while resident() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert resident() == 0


def test_files_that_do_not_fit_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not take the 42 bytes of half, FLOAT16 \[7, 3\]"):
        MappedWeights(tmp_path).load_into(Parser(accepts=False), model)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: LARGE // 2])
    with pytest.raises(InputError, match=rf"model\.onnx\.data has {LARGE // 2} bytes; large takes {LARGE}"):
        MappedWeights(tmp_path).load_into(Parser(), model)
    data.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        MappedWeights(tmp_path).load_into(Parser(), model)
    data.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        MappedWeights(tmp_path).load_into(Parser(), model)
