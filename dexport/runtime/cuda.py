"""The little of CUDA that a session needs: a device, a stream, buffers and captured graphs.

The driver is reached through cuda-python (``cuda.bindings.driver``), as :mod:`dexport.plugins.launch` does.
NEVER RUN ON A GPU: there was none when this was written. Tests run it against a stand-in for the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dexport.errors import MachineError
from dexport.optional import optional_import

NAME_LENGTH = 256


class Cuda:
    """The driver's functions, called by name, their status checked.

    Args:
        extra: the extra of dexport that the error names when cuda-python is missing.

    Raises:
        MachineError: cuda-python is missing.
    """

    def __init__(self, extra: str = "") -> None:
        self.driver: Any = optional_import("cuda.bindings.driver", extra)

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call ``function`` and return its result, None if it has none.

        Raises:
            MachineError: the driver answers with an error; it names the function and has the driver's words.
        """
        status, *results = getattr(self.driver, function)(*arguments)
        if int(status) != 0:
            raise MachineError(f"CUDA: {function} failed: {self._describe(status)}")
        return results[0] if results else None

    def release(self, function: str, *arguments: Any) -> None:
        """Call a function that gives something back.

        Its status is ignored: after a fault the driver answers every call with that fault, which was raised already.
        """
        getattr(self.driver, function)(*arguments)

    def _describe(self, status: Any) -> str:
        known, text = self.driver.cuGetErrorString(status)
        name = getattr(status, "name", str(status))
        return f"{name}, {text.decode()}" if int(known) == 0 and text else name


@dataclass(frozen=True)
class Gpu:
    """The GPU that a session uses.

    Attributes:
        device: the driver's handle.
        target: compute capability, such as ``sm89``.
    """

    device: Any
    name: str
    target: str


def find_gpu(cuda: Cuda) -> Gpu:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves visible. Creates no CUDA context.

    Raises:
        MachineError: there is none, or its driver is missing or does not work.
    """
    try:
        cuda("cuInit", 0)
        count = cuda("cuDeviceGetCount")
    # cuda-python raises a RuntimeError where there is no driver to load.
    except (MachineError, RuntimeError) as error:
        raise _no_gpu(str(error)) from error
    if not count:
        raise _no_gpu("the driver shows none")
    device = cuda("cuDeviceGet", 0)
    name = cuda("cuDeviceGetName", NAME_LENGTH, device)
    attributes = cuda.driver.CUdevice_attribute
    major = cuda("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = cuda("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(device, name.decode().rstrip("\0"), f"sm{major}{minor}")


def _no_gpu(why: str) -> MachineError:
    return MachineError(
        f"no NVIDIA GPU can be used here, and TensorRT engines run on nothing else: {why}",
        hint="run the bundle's ONNX file with --provider cpu, or copy the bundle to a machine with a GPU",
    )


class Device:
    """A GPU's primary context, which torch and ONNX Runtime share; current inside ``with device:``."""

    def __init__(self, cuda: Cuda, gpu: Gpu) -> None:
        self._cuda, self._device = cuda, gpu.device
        self._context = cuda("cuDevicePrimaryCtxRetain", gpu.device)

    def __enter__(self) -> None:
        self._cuda("cuCtxPushCurrent", self._context)

    def __exit__(self, *_: object) -> None:
        self._cuda.release("cuCtxPopCurrent")

    def close(self) -> None:
        """Give the context back."""
        self._cuda.release("cuDevicePrimaryCtxRelease", self._device)


class Buffer:
    """Device memory that grows.

    Attributes:
        pointer: its address, 0 before the first :meth:`reserve`.
        size: in bytes.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.pointer = self.size = 0

    def reserve(self, size: int) -> None:
        """Make room for ``size`` bytes. Growing moves the buffer and forgets what was in it."""
        if size > self.size:
            self.free()
            self.pointer, self.size = int(self._cuda("cuMemAlloc", size)), size

    def upload(self, array: np.ndarray, stream: Stream) -> None:
        """Copy a C-contiguous array to the device."""
        self._cuda("cuMemcpyHtoDAsync", self.pointer, array.ctypes.data, array.nbytes, stream.stream)

    def download(self, array: np.ndarray, stream: Stream) -> None:
        """Copy from the device into a C-contiguous array, which is complete once the stream is synchronised."""
        self._cuda("cuMemcpyDtoHAsync", array.ctypes.data, self.pointer, array.nbytes, stream.stream)

    def free(self) -> None:
        """Give the memory back."""
        if self.pointer:
            self._cuda.release("cuMemFree", self.pointer)
            self.pointer = self.size = 0


class Stream:
    """A stream of its own, which waits for no other.

    Attributes:
        stream: the driver's handle.
        handle: the same as an integer, as TensorRT takes it.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.stream = cuda("cuStreamCreate", int(cuda.driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.handle = int(self.stream)

    def synchronize(self) -> None:
        """Wait for everything in the stream; errors of its work appear here."""
        self._cuda("cuStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What ``enqueue`` puts into the stream, as a graph; nothing of it runs."""
        # Other threads may go on allocating: only this one's calls are held to the rules of a capture.
        mode = self._cuda.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._cuda("cuStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            # A stream that still captures would refuse everything that follows.
            _, unfinished = self._cuda.driver.cuStreamEndCapture(self.stream)
            self._cuda.release("cuGraphDestroy", unfinished)
            raise
        captured = self._cuda("cuStreamEndCapture", self.stream)
        try:
            return Graph(self._cuda, self, self._cuda("cuGraphInstantiate", captured, 0))
        finally:
            self._cuda.release("cuGraphDestroy", captured)

    def close(self) -> None:
        """Give the stream back."""
        self._cuda.release("cuStreamDestroy", self.stream)


class Graph:
    """Captured work that can be launched again and again, at the addresses it was captured with."""

    def __init__(self, cuda: Cuda, stream: Stream, executable: Any) -> None:
        self._cuda, self._stream, self._executable = cuda, stream, executable

    def launch(self) -> None:
        """Put the work into the stream."""
        self._cuda("cuGraphLaunch", self._executable, self._stream.stream)

    def close(self) -> None:
        """Give the graph back."""
        self._cuda.release("cuGraphExecDestroy", self._executable)
