"""A deserialized TensorRT engine with its stream and buffers: arrays in, arrays out.

NEVER RUN ON A GPU: there was none when this was written. What the API of ``tensorrt_rtx`` 1.7 can show without one
(names, arguments, refusals) has been tried, and tests run this against a stand-in. ``tensorrt`` follows its
documentation.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dexport.errors import InputError, MachineError
from dexport.runtime.cuda import Buffer, Cuda, Device, Gpu, Graph, Stream

DTYPES = {"FLOAT": "float32", "INT64": "int64", "BOOL": "bool"}
"""TensorRT's names of the types that inputs and outputs have; see DESIGN section 4."""
MOST_LANES = 8
"""Captured graphs kept, each with a context: more shapes than that at once are rare."""
LOGGED_ERRORS = 3

Shape = tuple[int, ...]


class Graphs(Enum):
    """Who makes CUDA graphs: nobody, TensorRT itself (TensorRT-RTX does, and follows shapes), or this module."""

    OFF = "no CUDA graph"
    OWN = "its own CUDA graphs"
    CAPTURED = "captured CUDA graphs"


class Engine:
    """An engine on the GPU. Not for several threads at once.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        inputs, outputs: names, in order, and dtypes that the engine must have.

    Raises:
        MachineError: CUDA or TensorRT fails; everything is freed.
        InputError: the engine's inputs and outputs are others.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        gpu: Gpu,
        plan: Path,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        graphs: Graphs,
    ) -> None:
        self._trt, self._cuda, self._graphs = trt, cuda, graphs
        self._inputs, self._outputs = inputs, outputs
        # TensorRT's objects log as long as they live.
        self._log = make_log(trt)
        self._engine: Any = None
        self._context: Any = None
        self._lanes: dict[tuple[Shape, ...], Lane] = {}
        self._stream: Stream | None = None
        self._memory = Buffer(cuda)
        self._buffers = {name: Buffer(cuda) for name in (*inputs, *outputs)}
        self._device = Device(cuda, gpu)
        try:
            with self._device:
                self._engine = self._deserialize(plan)
                self._check_tensors(plan)
                self._stream = Stream(cuda)
                if graphs is not Graphs.CAPTURED:
                    self._context = self._create_context()
        except BaseException:
            self.close()
            raise

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            arrays: every input, checked.

        Raises:
            MachineError: CUDA or TensorRT fails.
        """
        assert self._stream is not None
        feed = {name: np.asarray(arrays[name], order="C") for name in self._inputs}
        with self._device:
            lane = self._lane(tuple(array.shape for array in feed.values()))
            for name, array in feed.items():
                self._buffers[name].upload(array, self._stream)
            lane.run()
            results = {name: np.empty(shape, self._outputs[name]) for name, shape in lane.outputs.items()}
            for name, array in results.items():
                self._buffers[name].download(array, self._stream)
            self._stream.synchronize()
        return results

    def close(self) -> None:
        """Free everything, users before what they use."""
        with self._device:
            self._drop_lanes()
            self._context = None
            self._engine = None
            for buffer in (*self._buffers.values(), self._memory):
                buffer.free()
            if self._stream is not None:
                self._stream.close()
        self._device.close()

    def _deserialize(self, plan: Path) -> Any:
        runtime = self._trt.Runtime(self._log)
        # Mapped, so that a plan of gigabytes is not copied into this process first.
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return self._made(runtime.deserialize_cuda_engine(content), f"deserialize {plan}")

    def _check_tensors(self, plan: Path) -> None:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        kinds = {name: self._engine.get_tensor_dtype(name).name for name in names}
        found = {name: DTYPES.get(kind, kind) for name, kind in kinds.items()}
        expected = {**self._inputs, **self._outputs}
        if found != expected:
            raise InputError(
                f"{plan} has the inputs and outputs {_spell(found)}; the manifest says {_spell(expected)}",
                hint="build it again",
            )

    def _create_context(self) -> Any:
        engine = self._engine
        if self._graphs is Graphs.OFF:
            return self._made(engine.create_execution_context(), "create a context")
        if self._graphs is Graphs.OWN:
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            return self._made(engine.create_execution_context(config), "create a context")
        # One context per captured graph is TensorRT's rule; one after the other, they can share their scratch memory.
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._made(engine.create_execution_context(strategy), "create a context")
        if engine.device_memory_size_v2:
            self._memory.reserve(engine.device_memory_size_v2)
            context.set_device_memory(self._memory.pointer, self._memory.size)
        return context

    def _lane(self, shapes: tuple[Shape, ...]) -> Lane:
        """The lane of these input shapes, in order."""
        if shapes not in self._lanes:
            # A context that all shapes share serves only the last one.
            if self._context is not None or len(self._lanes) == MOST_LANES:
                self._drop_lanes()
            # Opening may drop the others, so it comes before the new one is kept.
            lane = self._open_lane(shapes)
            self._lanes[shapes] = lane
        return self._lanes[shapes]

    def _open_lane(self, shapes: tuple[Shape, ...]) -> Lane:
        assert self._stream is not None
        context = self._context or self._create_context()
        given = dict(zip(self._inputs, shapes, strict=True))
        for name, shape in given.items():
            self._made(context.set_input_shape(name, shape), f"give {name} the shape {list(shape)}")
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        unknown = [name for name, shape in outputs.items() if any(size < 0 for size in shape)]
        self._made(not unknown, f"tell the shape of {', '.join(unknown)}")
        self._reserve({**given, **outputs})
        for name, buffer in self._buffers.items():
            self._made(context.set_tensor_address(name, buffer.pointer), f"take the address of {name}")
        handle = self._stream.handle

        def enqueue() -> None:
            self._made(context.execute_async_v3(handle), "run the engine")

        return Lane(enqueue, outputs, self._stream, captures=self._graphs is Graphs.CAPTURED)

    def _reserve(self, shapes: Mapping[str, Shape]) -> None:
        dtypes = {**self._inputs, **self._outputs}
        sizes = {name: int(np.prod(shape)) * np.dtype(dtypes[name]).itemsize for name, shape in shapes.items()}
        if any(size > self._buffers[name].size for name, size in sizes.items()):
            # Other lanes hold addresses that now move.
            self._drop_lanes()
        for name, size in sizes.items():
            self._buffers[name].reserve(size)

    def _drop_lanes(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    def _made(self, result: Any, what: str) -> Any:
        """What TensorRT returned; None and False are how it says that it could not."""
        if result is None or result is False:
            said = "; ".join(self._log.errors) or "it does not say why"
            self._log.errors = []
            raise MachineError(f"TensorRT cannot {what}: {said}")
        return result


class Lane:
    """One way to call an engine: a context with its shapes and addresses set, behind ``enqueue``.

    Attributes:
        outputs: name -> shape.
    """

    def __init__(
        self, enqueue: Callable[[], None], outputs: Mapping[str, Shape], stream: Stream, *, captures: bool
    ) -> None:
        self.outputs = outputs
        self._enqueue, self._stream, self._captures = enqueue, stream, captures
        self._warm = False
        self._graph: Graph | None = None

    def run(self) -> None:
        """Put one run into the stream; where it captures, as a graph from the second run on."""
        # After a change of shapes TensorRT leaves some of its work to the next run, which is not to be captured.
        if self._captures and self._warm and self._graph is None:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()
            self._warm = True

    def close(self) -> None:
        """Give the graph back."""
        if self._graph is not None:
            self._graph.close()

    def _capture(self) -> Graph:
        try:
            return self._stream.capture(self._enqueue)
        except MachineError as error:
            raise MachineError(
                f"this engine cannot be captured as a CUDA graph: {error}",
                hint="open it with TensorRtSession(bundle, cuda_graph=False)",
            ) from error


def make_log(trt: Any) -> Any:
    """A logger for TensorRT that keeps the texts of errors in ``errors`` and prints nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors = [*self.errors[1 - LOGGED_ERRORS :], msg]

    return Log()


def _spell(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in tensors.items())
