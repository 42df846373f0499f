"""PyTorch modules behind the interface of the runtime's sessions."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import torch
from torch import nn

from dexport.exporter.recipes.recipe import Signature
from dexport.runtime.inputs import port_of


class TorchSession:
    """A module behind the call signature of every session: named numpy inputs, a dict of numpy outputs.

    Args:
        module: takes its inputs by position, in the order of the signature.
        device: where it runs, in PyTorch's words.

    Attributes:
        inputs: name -> shape and type of each input; ``"B"`` is the symbolic batch.
    """

    def __init__(self, module: nn.Module, signature: Signature, device: str = "cpu") -> None:
        self._module = module.eval().to(device)
        self._device = device
        self._outputs = [spec.name for spec in signature.outputs]
        self.inputs = {spec.name: port_of(spec.port) for spec in signature.inputs}
        self.runner = torch_runner(device)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once, without gradients."""
        with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):  # what a network prints is no result
            tensors = (torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs)
            results = self._module(*(tensor.to(self._device) for tensor in tensors))
        outputs = results if isinstance(results, tuple) else (results,)
        return {name: tensor.cpu().numpy() for name, tensor in zip(self._outputs, outputs, strict=True)}


def torch_runner(device: str = "cpu") -> str:
    """What computes the references, for reports."""
    return f"PyTorch {torch.__version__} float32 on {device.upper()}"
