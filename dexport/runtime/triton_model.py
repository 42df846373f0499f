"""The pipeline of a bundle in the Python backend of NVIDIA's Triton Inference Server.

Imported by the ``model.py`` that ``dexport pack --triton`` writes. Needs numpy and onnxruntime; neither torch nor onnx.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # only there inside of the server

from dexport.errors import DexportError
from dexport.runtime.opened import OpenProgram
from dexport.runtime.service import Picture, Service, Worker

TAKEN = b"used_dltensor"
"""A capsule keeps the pointer: this stays."""


class TritonPythonModel:
    """What the server calls. A bundle that does not open, for any reason, is a model that does not load."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        key = parameters.get("require_signature") or None
        self.program = OpenProgram.open(folder, parameters.get("provider", "cpu"), require_signature=key).load()
        self.program.check_pictures()
        self.worker = Worker(Service(self.program, config["max_batch_size"]))
        pb_utils.Logger.log_info(f"{folder}: {self.program.runner}")

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand the requests on; each is answered when it is done: pictures, or an error with the words of dexport."""
        self.worker.add(
            [(self._pictures(request), partial(_send, request.get_response_sender())) for request in requests]
        )

    def _pictures(self, request: Any) -> list[Picture]:
        seeds = _column(request, "seed", 0)
        labels = _column(request, "label", len(seeds))
        settings = {name: _column(request, name, len(seeds)) for name in self.program.program.numbers()}
        return [
            Picture(label, seed, {name: column[row] for name, column in settings.items()})
            for row, (label, seed) in enumerate(zip(labels, seeds, strict=True))
        ]

    def finalize(self) -> None:
        """Answer what is in progress, and end."""
        self.worker.stop()


def _send(sender: Any, answer: np.ndarray | DexportError) -> None:
    try:
        sender.send(_response(answer), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except pb_utils.TritonModelException as error:  # one client is gone; the others wait for the same thread
        pb_utils.Logger.log_warn(f"an answer was not sent: {error}")


def _column(request: Any, name: str, rows: int) -> list[Any]:
    """An input (B, 1) as a list; None for every row where the request lacks it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [None] * rows if tensor is None else np.from_dlpack(tensor).reshape(-1).tolist()


def _response(answer: np.ndarray | DexportError) -> Any:
    if isinstance(answer, DexportError):
        text = f"{answer} ({answer.hint})" if answer.hint else str(answer)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([_tensor("image", answer)])


def _tensor(name: str, array: np.ndarray) -> Any:
    """By DLPack: backends that were built for numpy 1 make an empty tensor of an array of numpy 2."""
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # Triton's name for a capsule that it took over is not DLPack's, and numpy would complain when the capsule ends.
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), ctypes.c_char_p(TAKEN))
    return tensor
