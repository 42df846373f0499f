"""A CUDA driver and a TensorRT that run on the host, and bundles for them: an engine is a numpy function.

The driver keeps account of all that is handed out, so that tests can ask for leaks, and fails where it is told to.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from dexport.bundle import MODEL, Bundle, Draft

PLAN = b"a plan of the pretended TensorRT"
ANY = -1
VERSION = "10.13.0.35"
FILE = "engines/model-tensorrt-sm89.plan"
MOST = 8


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeDriver:
    """``cuda.bindings.driver``: functions return (status, results...)."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )

    def __init__(self, capability: tuple[int, int] = (8, 9), devices: int = 1) -> None:
        self.capability, self.devices = capability, devices
        self.handles = itertools.count(1000)
        self.memory: dict[int, Any] = {}
        self.held: dict[int, Any] = {}
        self.retained = 0
        self.current: list[int] = []
        self.calls: list[str] = []
        self.failures: dict[str, list[int]] = {}
        self.captured: list[Callable[[], None]] | None = None

    def fail(self, function: str, *numbers: int) -> None:
        """Let these calls of a function fail, counted from 1 and from now."""
        self.failures[function] = [self.calls.count(function) + number for number in numbers]

    @property
    def clean(self) -> bool:
        """Whether all that was handed out has come back."""
        return not (self.memory or self.held or self.retained or self.current)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(value):
            return value

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if self.calls.count(name) in self.failures.get(name, ()):
                return (Status.CUDA_ERROR_ILLEGAL_ADDRESS, None)
            return value(*arguments)

        return call

    def cuGetErrorString(self, status: Status) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, status.name.lower().replace("_", " ").encode()

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == 0
        return ((Status.CUDA_SUCCESS if self.devices else Status.CUDA_ERROR_NO_DEVICE),)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, ordinal

    def cuDeviceGetName(self, length: int, _device: int) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, b"Pretended GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, _device: int) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.capability[attribute - 75]

    def cuDevicePrimaryCtxRetain(self, _device: int) -> tuple[Any, ...]:  # noqa: N802
        self.retained += 1
        return Status.CUDA_SUCCESS, 1

    def cuDevicePrimaryCtxRelease(self, _device: int) -> tuple[Any, ...]:  # noqa: N802
        self.retained -= 1
        return (Status.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        self.current.append(context)
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.current.pop()

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == 1
        return Status.CUDA_SUCCESS, self._hold("stream")

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self._give_back(stream, "stream")

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.held[stream] == "stream" and self.captured is None
        return (Status.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.held[stream] == "stream" and mode == 1 and self.captured is None
        self.captured = []
        return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.held[stream] == "stream"
        work, self.captured = self.captured, None
        return Status.CUDA_SUCCESS, self._hold(work)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == 0
        return Status.CUDA_SUCCESS, self._hold(list(self.held[graph]))

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.held[stream] == "stream"
        for work in self.held[executable]:
            work()
        return (Status.CUDA_SUCCESS,)

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:  # noqa: N802
        return self._give_back(graph)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:  # noqa: N802
        return self._give_back(executable)

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        assert size > 0 and self.current
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return Status.CUDA_SUCCESS, ctypes.addressof(block)

    def cuMemFree(self, pointer: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.current
        del self.memory[pointer]
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.held[stream] == "stream" and size <= len(self.memory[target])
        ctypes.memmove(target, source, size)
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.held[stream] == "stream" and size <= len(self.memory[source])
        ctypes.memmove(target, source, size)
        return (Status.CUDA_SUCCESS,)

    def view(self, pointer: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Device memory as an array; a pointer that was freed is a KeyError."""
        count = int(np.prod(shape))
        assert np.dtype(dtype).itemsize * count <= len(self.memory[pointer])
        return np.frombuffer(self.memory[pointer], dtype, count).reshape(shape)

    def _hold(self, thing: Any) -> int:
        handle = next(self.handles)
        self.held[handle] = thing
        return handle

    def _give_back(self, handle: int, kind: Any = None) -> tuple[Any, ...]:
        thing = self.held.pop(handle)
        assert kind is None or thing == kind
        return (Status.CUDA_SUCCESS,)


class FakeEngine:
    """out (B, 4) = x (B, 4) * scale () + y (B,): three inputs, one of them without dimensions."""

    tensors = {  # noqa: RUF012
        "x": ("FLOAT", (ANY, 4)),
        "y": ("INT64", (ANY,)),
        "scale": ("FLOAT", ()),
        "out": ("FLOAT", (ANY, 4)),
    }
    device_memory_size_v2 = 512

    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][0])

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy="DISABLED")

    def create_execution_context(self, argument: Any = "STATIC") -> FakeContext | None:
        if self.module.refuse == "context":
            self.module.log.log(self.module.ILogger.ERROR, "no context today")
            return None
        self.module.contexts.append(FakeContext(self.module, self, argument))
        return self.module.contexts[-1]


class FakeContext:
    """Holds shapes and addresses, and computes."""

    def __init__(self, module: FakeTensorRt, engine: FakeEngine, argument: Any) -> None:
        self.module, self.engine, self.argument = module, engine, argument
        self.driver = module.driver
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self.engine.tensors[name][1]
        fits = len(shape) == len(wanted) and all(a in (ANY, b) for a, b in zip(wanted, shape, strict=True))
        self.shapes[name] = shape
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "out"
        return self.shapes["x"]

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer in self.driver.memory
        self.addresses[name] = pointer
        return True

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert len(self.driver.memory[pointer]) >= size
        self.scratch = pointer

    def execute_async_v3(self, stream: int) -> bool:
        assert self.driver.held[stream] == "stream" and self.driver.current
        assert set(self.shapes) == {"x", "y", "scale"} and set(self.addresses) == set(self.engine.tensors)
        if self.argument == "USER_MANAGED":
            assert self.scratch in self.driver.memory
        if self.module.refuse == "run" or (self.module.refuse == "capture" and self.driver.captured is not None):
            self.module.log.log(self.module.ILogger.ERROR, "cannot run today")
            return False
        self.module.enqueued += 1
        # As in a real capture, shapes and addresses are those of this moment.
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.driver.captured is not None:
            self.driver.captured.append(lambda: self.compute(shapes, addresses))
        else:
            self.compute(shapes, addresses)
        return True

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        x, scale = (self.driver.view(addresses[name], shapes[name], "float32") for name in ("x", "scale"))
        y = self.driver.view(addresses["y"], shapes["y"], "int64")
        self.driver.view(addresses["out"], shapes["x"], "float32")[:] = x * scale + y[:, None]


class FakeTensorRt(ModuleType):
    """``tensorrt``; with ``rtx`` it has TensorRT-RTX's own CUDA graphs.

    Attributes:
        refuse: ``context``, ``run`` or ``capture``: what it cannot do.
        enqueued: how often an engine was put into a stream, captures included.
    """

    def __init__(self, driver: FakeDriver, version: str, *, rtx: bool = False) -> None:
        super().__init__("tensorrt_rtx" if rtx else "tensorrt")
        self.driver, self.__version__ = driver, version
        self.refuse = ""
        self.enqueued = 0
        self.contexts: list[FakeContext] = []
        self.engine: type[FakeEngine] = FakeEngine
        self.log: Any = None
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")

    class ILogger:
        INTERNAL_ERROR, ERROR, INFO = "INTERNAL_ERROR", "ERROR", "INFO"

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        self.log = log
        return SimpleNamespace(deserialize_cuda_engine=self.deserialize)

    def deserialize(self, plan: Any) -> FakeEngine | None:
        assert self.driver.current
        if bytes(plan) != PLAN:
            self.log.log(self.ILogger.INFO, "looks odd")
            self.log.log(self.ILogger.ERROR, "magic tag differs")
            return None
        return self.engine(self)


def manifest(**engine: Any) -> dict[str, Any]:
    """The manifest of a :class:`FakeEngine`; keyword arguments replace facts of the engine."""

    def spec(name: str, dtype: str, *shape: Any) -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    batches = (1, 2, MOST)
    shapes = {"x": [[b, 4] for b in batches], "y": [[b] for b in batches], "scale": [[], [], []]}
    return {
        "name": "small",
        "status": "passed",
        "batch": {"min": 1, "opt": 2, "max": MOST},
        "precision": {"name": "fp16"},
        "custom_ops": [{"name": "DexTMSA", "ptx_sha256": []}],
        "io": {
            "inputs": [spec("x", "float32", "B", 4), spec("y", "int64", "B"), spec("scale", "float32")],
            "outputs": [spec("out", "float32", "B", 4)],
        },
        "engine": {
            "file": FILE,
            "flavour": "tensorrt",
            "version": VERSION,
            "targets": ["sm86", "sm89"],
            "fingerprint": {"shapes": shapes},
            **engine,
        },
    }


def write_bundle(folder: Path, plan: bytes = PLAN, **changed: Any) -> Bundle:
    """Such a bundle; keyword arguments replace sections of :func:`manifest`."""
    facts = {**manifest(), **changed}
    graph = {**facts.pop("io"), **{name: facts.pop(name) for name in ("engine", "custom_ops")}, "nodes": {}}
    program = facts.pop("program", None)
    with Draft(folder) as draft:
        draft.write_text(MODEL, "not opened here")
        (draft.path / "engines").mkdir()
        (draft.path / FILE).write_bytes(plan)
        networks = {"network": {**facts, "graphs": {"model": graph}}}
        return draft.commit(
            {"name": facts["name"], "status": facts["status"], "program": program, "networks": networks}
        )
