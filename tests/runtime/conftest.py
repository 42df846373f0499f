"""Fixtures: a CUDA driver and a TensorRT that run on the host."""

from __future__ import annotations

import sys

import pytest

from tests.runtime.fake_gpu import VERSION, FakeDriver, FakeTensorRt


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The CUDA driver is one that runs on the host."""
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]
    return driver


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """The datacenter TensorRT is one that runs on the host; TensorRT-RTX is missing."""
    module = FakeTensorRt(driver, VERSION)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    return module
