"""What a bundle is compared with: the float32 PyTorch network of its recipe, with the weights it was built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from dexport.bundle import Bundle
from dexport.exporter.checkpoint import WeightSource, load_into
from dexport.exporter.manifest import tensor_specs
from dexport.exporter.origin import variant_of, weights_of
from dexport.exporter.recipes.recipe import Recipe, Signature
from dexport.exporter.variant import Variant
from dexport.runtime.inputs import port_of


class TorchSession:
    """A module behind the call signature of every session: named numpy inputs, a dict of numpy outputs.

    Args:
        module: takes its inputs by position, in the order of the signature.

    Attributes:
        inputs: name -> shape and type of each input; ``"B"`` is the symbolic batch.
    """

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        self._module = module.eval()
        self._outputs = [spec.name for spec in signature.outputs]
        self.inputs = {spec["name"]: port_of(spec) for spec in tensor_specs(signature.inputs)}
        self.runner = torch_runner()

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once, without gradients."""
        with torch.inference_mode():
            results = self._module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs))
        tensors = results if isinstance(results, tuple) else (results,)
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, tensors, strict=True)}


def torch_runner() -> str:
    """What computes the references, for reports."""
    return f"PyTorch {torch.__version__} float32 on CPU"


def torch_session(variant: Variant, weights: WeightSource) -> TorchSession:
    """The reference of a variant."""
    return TorchSession(variant.wrap(load_into(weights, variant.meta_module())), variant.signature)


def tapped_outputs(
    variant: Variant, weights: WeightSource, paths: Sequence[str], inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One evaluation of the reference.

    Returns:
        What the modules at ``paths`` returned, in the order in which they ended, without those that return no tensor;
        and the outputs by name.
    """
    network = load_into(weights, variant.meta_module())
    session = TorchSession(variant.wrap(network), variant.signature)
    outputs: dict[str, np.ndarray] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                outputs[path] = output.numpy()

        return hook

    for path in paths:
        network.get_submodule(path).register_forward_hook(watch(path))
    return outputs, session(**inputs)


def reference_of(bundle: Bundle, checkpoint: str | None = None, recipe: Recipe | None = None) -> TorchSession:
    """The reference of a bundle that holds one network, from what its manifest says.

    Args:
        checkpoint: where the weights are now, if not where they were.
        recipe: for a bundle that was built from a recipe of one's own.

    Raises:
        InputError: the checkpoint is not the one that the bundle was built from.
        UsageError: the checkpoint or the recipe is not there.
    """
    variant = variant_of(bundle.manifest, recipe)
    return torch_session(variant, weights_of(bundle.manifest["weights"], variant, checkpoint))
