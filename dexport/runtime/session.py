"""One call signature over the runtimes: ``session(x=..., t=..., y=...) -> {"out": array}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dexport.bundle import Bundle, load_bundle
from dexport.errors import InputError, MachineError, UsageError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERRORS_ONLY = 3


class OnnxSession:
    """An ONNX file in ONNX Runtime.

    Args:
        provider: ``cpu`` or ``cuda``. The provider that really runs is asserted: ONNX Runtime falls back to the CPU
            silently.

    Attributes:
        runner: what runs, for reports, such as ``ONNX Runtime 1.31.1, CPUExecutionProvider``.

    Raises:
        MachineError: the provider is not there.
        InputError: ONNX Runtime refuses the model.
    """

    def __init__(self, model_path: str | Path, provider: str = "cpu") -> None:
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
        try:
            self._session = ort.InferenceSession(str(model_path), options, providers=[wanted])
        except Exception as error:
            raise InputError(
                f"ONNX Runtime cannot load {model_path}: {error}", hint="build it again, or upgrade onnxruntime"
            ) from error
        if self._session.get_providers()[0] != wanted:
            raise MachineError(
                f"{wanted} was asked for, but {self._session.get_providers()[0]} runs",
                hint="`dexport doctor` says what this machine can run",
            )
        self.runner = f"ONNX Runtime {ort.__version__}, {wanted}"
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: one array per input of the graph, by name, in its dtype.

        Raises:
            UsageError: missing, unknown or wrongly typed or shaped inputs, or values out of range.
        """
        arrays = {name: _native(value) for name, value in inputs.items()}
        self._check(arrays)
        try:
            results = self._session.run(self.outputs, arrays)
        except Exception as error:
            raise UsageError(f"ONNX Runtime refuses these inputs: {error}") from error
        return dict(zip(self.outputs, results, strict=True))

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        if set(inputs) != set(self.inputs):
            raise UsageError(f"this model takes {', '.join(self.inputs)}; got {', '.join(inputs) or 'nothing'}")
        sizes: dict[str, int] = {}
        for name, value in self.inputs.items():
            array = inputs[name]
            if not _fits(array.shape, value.shape):
                raise UsageError(f"input {name} has shape {list(array.shape)}, expected {list(value.shape)}")
            if value.type != f"tensor({ORT_TYPE_NAMES.get(array.dtype.name, array.dtype.name)})":
                raise UsageError(f"input {name} has dtype {array.dtype.name}, expected {value.type}")
            for size, dim in zip(array.shape, value.shape, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise UsageError(f"input {name} has {dim} = {size}, but an input before it has {sizes[dim]}")


ORT_TYPE_NAMES = {"float32": "float", "float64": "double"}


def _native(value: Any) -> np.ndarray:
    """The value as an array in this machine's byte order, which is the only one that ONNX Runtime reads right."""
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    return len(shape) == len(expected) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, expected, strict=True)
    )


def open_bundle(path: str | Path, provider: str = "cpu") -> OnnxSession:
    """Check a bundle's hashes and open its ONNX model."""
    return open_session(load_bundle(path), provider)


def open_session(bundle: Bundle, provider: str = "cpu") -> OnnxSession:
    """Open the ONNX model of a bundle whose hashes have been checked."""
    if bundle.stitch:
        raise UsageError(
            f"{bundle.path} holds {len(bundle.stitch)} denoisers, not one model",
            hint=f"open one of {', '.join(str(part.path) for part, _ in bundle.stitch)}, or use `dexport sample`",
        )
    return OnnxSession(bundle.model_path, provider)
