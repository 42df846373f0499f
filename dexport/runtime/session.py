"""One call signature over the runtimes: ``session(x=..., t=..., y=...) -> {"out": array}``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from dexport.bundle import Network, load_bundle, network_of
from dexport.errors import InputError, MachineError, UsageError
from dexport.limits import shown
from dexport.runtime.inputs import Accepted, accepted_of, as_arrays, check_inputs
from dexport.runtime.int8_products import multiply_exactly
from dexport.runtime.tensorrt_session import TensorRtSession

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TENSORRT = "tensorrt"
ERRORS_ONLY = 3
STOP_SPINNING = "session.force_spinning_stop"
LONGEST = 500
"""Characters of an error of ONNX Runtime that are shown."""
DATA_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxSession:
    """An ONNX file in ONNX Runtime.

    Args:
        model: path of the file, or its bytes; then ``data_folder`` is where its external data lies.
        provider: ``cpu`` or ``cuda``. The provider that really runs is asserted: ONNX Runtime falls back to the CPU
            silently.
        threads: of the CPU; None for what ONNX Runtime chooses.
        accepted: the values of inputs that index a table, which a graph does not say: it takes negative ones too.

    Attributes:
        runner: what runs, for reports, such as ``ONNX Runtime 1.31.1, CPUExecutionProvider``.

    Raises:
        MachineError: the provider is not there.
        InputError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        provider: str = "cpu",
        *,
        data_folder: Path | None = None,
        threads: int | None = None,
        accepted: Mapping[str, Accepted] | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise UsageError(f"no provider {provider!r}", hint=f"choose from {', '.join(PROVIDERS)}")
        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            raise MachineError(
                f"this ONNX Runtime has no {wanted}; it has {', '.join(ort.get_available_providers())}",
                hint="pip uninstall onnxruntime && pip install 'dexport[gpu]'",
            )
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
            options.add_session_config_entry(STOP_SPINNING, "1")  # or idle threads slow whoever runs next
        if data_folder is not None:
            options.add_session_config_entry(DATA_FOLDER, str(data_folder))
        content = model if isinstance(model, bytes) else str(model)
        try:
            multiply_exactly(options, model)
            self._session = ort.InferenceSession(content, options, providers=[wanted])
        except Exception as error:
            raise InputError(
                f"ONNX Runtime cannot load {data_folder or model!s}: {' '.join(str(error).split())[:LONGEST]}",
                hint="build it again, or upgrade onnxruntime",
            ) from error
        if self._session.get_providers()[0] != wanted:
            raise MachineError(
                f"{wanted} was asked for, but {self._session.get_providers()[0]} runs",
                hint="`dexport doctor` says what this machine can run",
            )
        self._accepted = accepted
        self.runner = f"ONNX Runtime {ort.__version__}, {wanted}"
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.output_ports = {value.name: value for value in self._session.get_outputs()}
        self.outputs = list(self.output_ports)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: one array per input of the graph, by name, in its dtype.

        Raises:
            UsageError: missing, unknown or wrongly typed or shaped inputs, or values out of range.
        """
        arrays = as_arrays(inputs)
        check_inputs(self.inputs, arrays, self._accepted)
        try:
            results = self._session.run(self.outputs, arrays)
        except Exception as error:
            raise UsageError(f"ONNX Runtime refuses these inputs: {error}") from error
        return dict(zip(self.outputs, results, strict=True))


def open_bundle(
    path: str | Path,
    provider: str = "cpu",
    require_signature: str | Path | None = None,
    network: str | None = None,
    graph: str = "",
) -> OnnxSession | TensorRtSession:
    """Check a bundle's hashes, and its signature where one is required, and open a graph of a network.

    Args:
        network, graph: by name; by default the main ones.

    Raises:
        UsageError: no such network or graph, or several networks of the main role.
    """
    return open_session(network_of(load_bundle(path, require_signature), network, graph), provider, graph)


def open_session(network: Network, provider: str = "cpu", graph: str = "") -> OnnxSession | TensorRtSession:
    """Open a graph of a network in a bundle whose hashes have been checked.

    Args:
        provider: ``cpu`` or ``cuda`` for its ONNX file, ``tensorrt`` for its engine of either flavour.
        graph: by name; by default the main one.

    Raises:
        UsageError: no such graph.
    """
    graph = graph or network.main_graph
    if graph not in network.graphs:
        raise UsageError(
            f"{network.bundle.path} has no graph {shown(graph)}", hint=f"it has {', '.join(network.graphs)}"
        )
    if provider == TENSORRT:
        return TensorRtSession(network, graph)
    if provider not in PROVIDERS:
        raise UsageError(f"no provider {provider!r}", hint=f"choose from {', '.join(PROVIDERS)}, {TENSORRT}")
    return OnnxSession(network.model_path(graph), provider, accepted=accepted_of(network.graphs[graph].inputs))
