"""What a bundle is compared with: the float32 PyTorch network of its recipe, with the weights it was built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dexport.bundle import Bundle, sha256_of
from dexport.errors import InputError, UsageError
from dexport.exporter.checkpoint import WeightSource, load_into, open_weights
from dexport.exporter.inherit import inherit_weights
from dexport.exporter.manifest import tensor_specs
from dexport.exporter.recipes import find_recipe
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


def variant_of(manifest: Mapping[str, Any], recipe: Recipe | None = None) -> Variant:
    """The variant that a manifest describes."""
    height, width = manifest["latent"]
    recipe = recipe or find_recipe(manifest["recipe"]["name"])
    return Variant(recipe, manifest["config"], (height, width), fused=manifest["guidance"] != "none")


def weights_of(origin: Mapping[str, Any], variant: Variant, checkpoint: str | None = None) -> WeightSource:
    """The weights that a manifest names; a file must have the hash that it had."""
    module, seed = variant.meta_module(), origin["seed"] or 0
    if origin["kind"] == "random":
        return open_weights(None, module, seed=seed, adapt=variant.recipe.adapt)
    path = Path(checkpoint or origin["path"])
    if not path.is_file():
        raise UsageError(
            f"the bundle was built from {origin['path']}, which is not there", hint="give its place with --checkpoint"
        )
    if sha256_of(path) != origin["sha256"]:
        raise InputError(
            f"{path} is not the checkpoint that the bundle was built from: its sha256 differs",
            hint="give the right one with --checkpoint",
        )
    if origin["kind"] == "inherited":
        return inherit_weights(str(path), module, variant.recipe.not_inherited, seed)
    return open_weights(path, module, adapt=variant.recipe.adapt)
