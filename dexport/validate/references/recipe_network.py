"""What a bundle is compared with: the float32 PyTorch network of its recipe, with the weights it was built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from dexport.bundle import Network
from dexport.exporter.origin import variant_of, weights_of
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.torch_session import TorchSession
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource


@fresh_torch()
def torch_session(variant: Variant, weights: WeightSource) -> TorchSession:
    """The reference of a variant."""
    return TorchSession(variant.wrap(load_into(weights, variant.meta_module())), variant.signature)


@fresh_torch()
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


@fresh_torch()
def reference_of(
    network: Network, graph: str = "", checkpoint: str | None = None, recipe: Recipe | None = None
) -> TorchSession:
    """The reference of a network's graph, by default of the main one, from what its manifest says.

    Args:
        checkpoint: where the weights are now, if not where they were.
        recipe: for a network that was built from a recipe of one's own.

    Raises:
        InputError: the checkpoint is not the one that the network was built from.
        UsageError: the checkpoint or the recipe is not there.
    """
    variant = variant_of(network, recipe, graph)
    return torch_session(variant, weights_of(network.manifest["weights"], variant, checkpoint))
