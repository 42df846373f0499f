"""What the recipes of autoencoders in two halves share: files that hold both, sizes, islands, graded codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dexport.contract import PICTURE
from dexport.exporter.recipes.recipe import BATCH, DEFAULT_GATES, GraphRecipe, Islands, Signature, TensorSpec
from dexport.exporter.weights.checkpoint_view import View, stored
from dexport.exporter.weights.source import Adapter, WeightSource

GROUP_NORMS = ("GroupNormalization", "InstanceNormalization")
"""Before opset 21 a group norm becomes an instance norm between reshapes."""
WHOLE = frozenset({"encoder", "decoder", "quant_conv", "post_quant_conv", "quantize", "loss"})
"""First parts of the names in a whole file; ``loss`` is the discriminator and other parts of the training."""
FIRST = ("decoder.conv_in", "decoder.mid")
"""A decoder's layers at the lowest resolution. They cost little, and what they round goes through all others: they
are a tenth to a third of the error of a decoder in half precision."""
GATES = {**DEFAULT_GATES, "int8": 3e-2}
"""More in INT8: forty layers in a row lose 1.8e-2 to 2.3e-2, measured at full size with random weights."""
DISTANCES = "distances"
"""The graph that says how far each place of an image is from each code."""


def half(layout: str, prefix: str = "", training: Sequence[str] = ()) -> Adapter:
    """An adapter that takes one half's tensors from a file of both.

    Args:
        layout: what to call files of both halves.
        prefix: of the autoencoder in the files of larger models, which have other names too.
        training: names that only the training needs.
    """

    def adapt(source: WeightSource, module: nn.Module) -> WeightSource:
        inside = prefix if prefix and any(name.startswith(prefix) for name in source.shapes) else ""
        others = WHOLE - {name for name, _ in module.named_children()}
        names = {name.removeprefix(inside): name for name in source.shapes if name.startswith(inside)}
        own = {new: old for new, old in names.items() if new.partition(".")[0] not in others and new not in training}
        return View(source, {new: stored(source, old) for new, old in own.items()}, layout)

    return adapt


def factor_of(ch_mult: object) -> int:
    """Pixels of a cell along one side. Each level after the first halves; no list is refused by the constructor."""
    return 2 ** (len(ch_mult) - 1) if isinstance(ch_mult, Sequence) and ch_mult else 1


def islands(*modules: str) -> Islands:
    """Norms, attention and ``modules`` stay in float32."""
    return Islands(modules=modules, ops=(*Islands().ops, *GROUP_NORMS))


class _Distances(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.distances(image)


def distances(
    signature: Callable[[Mapping[str, Any], tuple[int, int]], Signature], codes: Callable[[Mapping[str, Any]], int]
) -> GraphRecipe:
    """The graph ``distances`` of an encoder to codes: image -> distances, one more dimension than the codes have.

    Args:
        signature: of the encoder.
        codes: how many there are.
    """

    def distances_signature(config: Mapping[str, Any], size: tuple[int, int]) -> Signature:
        plain = signature(config, size)
        shape = (*plain.outputs[0].shape, codes(config))
        return Signature(plain.inputs, (TensorSpec(DISTANCES, "float32", shape),))

    return GraphRecipe(distances_signature, lambda network, _: _Distances(network))


def picture(name: str, channels: int, size: tuple[int, int], factor: int = 1) -> TensorSpec:
    """The port of an image."""
    height, width = size
    return TensorSpec(name, "float32", (BATCH, channels, height * factor, width * factor), role=PICTURE)
