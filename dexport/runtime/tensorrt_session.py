"""A bundle's TensorRT engine behind the call signature of every session.

NEVER RUN ON A GPU: there was none when this was written, and TensorRT-RTX cannot even deserialize without one. The
checks before that have been run for real; the rest against stand-ins for TensorRT and the CUDA driver.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dexport.bundle import Network
from dexport.contract import Port
from dexport.errors import UsageError
from dexport.runtime.batches import BatchRange
from dexport.runtime.cuda import Cuda, find_gpu
from dexport.runtime.engine_checks import batches_of, check_ranges, check_target, import_tensorrt, read_facts
from dexport.runtime.engine_runner import Engine, Graphs
from dexport.runtime.inputs import NamedPort, accepted_of, as_arrays, check_inputs, port_of

PLUGINS = "dexport.plugins.register"
"""Importing it registers the plugins with TensorRT. By name, because compiling them, which is not needed here, imports
torch."""
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


class TensorRtSession:
    """A bundle's engine on the first visible GPU. Not for several threads at once.

    Inputs and outputs are in host memory and copied on every call. TensorRT itself does not check values: a label that
    the model does not have would give a meaningless result, and is refused here where the manifest has its range.

    Args:
        bundle: a bundle whose hashes have been checked.
        cuda_graph: replay captured work when shapes repeat. TensorRT-RTX captures by itself; for ``tensorrt`` the
            second run of each shape is captured and the following replay it.

    Attributes:
        runner: what runs, for reports, such as ``TensorRT 10.13.0.35, NVIDIA L4 (sm89), captured CUDA graphs``.
        inputs: name -> shape and type of each input; ``"B"`` is the symbolic batch.
        outputs: names of the outputs.
        batch_range: how many rows the engine takes.

    Raises:
        UsageError: the bundle has no engine.
        MachineError: TensorRT of the engine's flavour and version, cuda-python, a GPU, or its generation among the
            engine's targets is missing; or TensorRT or CUDA fails.
        InputError: the engine's inputs and outputs are not the manifest's.
    """

    def __init__(self, network: Network, graph: str = "", *, cuda_graph: bool = True) -> None:
        facts = read_facts(network, graph)
        trt = import_tensorrt(facts)
        cuda = Cuda(facts.extra)
        gpu = find_gpu(cuda)
        check_target(facts, gpu)
        if facts.plugins:
            importlib.import_module(PLUGINS)
        graphs = _graphs(trt, cuda_graph)
        ports = network.graphs[graph or network.main_graph]
        self._accepted = accepted_of(ports.inputs)
        self.inputs: Mapping[str, NamedPort] = {port.name: port_of(port) for port in ports.inputs}
        self.outputs = [port.name for port in ports.outputs]
        self.runner = f"{TITLES[facts.flavour]} {facts.version}, {gpu.name} ({gpu.target}), {graphs.value}"
        self.batch_range: BatchRange = batches_of(facts)
        self._facts = facts
        self._engine = Engine(trt, cuda, gpu, facts.plan, _dtypes(ports.inputs), _dtypes(ports.outputs), graphs)
        # Also runs when the session is collected, and at the interpreter's end.
        self._finalizer = weakref.finalize(self, self._engine.close)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: one array per input of the model, by name, in its dtype.

        Raises:
            UsageError: missing, unknown or wrongly typed or shaped inputs, values out of range, sizes that the engine
                was not built for, or a closed session.
            MachineError: TensorRT or CUDA fails; after a fault of the GPU, every later call does.
        """
        if not self._finalizer.alive:
            raise UsageError(f"the session of {self._facts.plan} is closed", hint="open it again")
        arrays = as_arrays(inputs)
        check_inputs(self.inputs, arrays, self._accepted)
        check_ranges(self._facts, arrays)
        return self._engine.run(arrays)

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything on the GPU; a second call does nothing."""
        self._finalizer()


def _graphs(trt: Any, wanted: bool) -> Graphs:
    if not wanted:
        return Graphs.OFF
    return Graphs.OWN if hasattr(trt, "CudaGraphStrategy") else Graphs.CAPTURED


def _dtypes(ports: Sequence[Port]) -> dict[str, str]:
    return {port.name: port.dtype for port in ports}
