"""SmoothQuant (arXiv 2211.10438): move the spread between channels from the activations into the weights.

Every input channel of a layer is divided by s and its row of the weight multiplied by s, so that the product stays.
In a transformer with adaptive norms 1/s disappears in the modulation in front: ``(norm(x) (1 + scale) + shift) / s``
scales two vectors per image. Elsewhere every token would have to be multiplied: nothing is done there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dexport.exporter.passes.lazy import add_initializer
from dexport.exporter.pytorch.module_path import module_path, set_module_path
from dexport.exporter.quantize.layers import Layer
from dexport.exporter.quantize.observer import LayerStatistics

ALPHA = 0.5
"""Share of the spread that the weights take."""
MOST = 2.0**12
"""Factor that is moved at most: a channel that is almost zero would need one that float16 cannot hold."""


def migration(seen: LayerStatistics, alpha: float = ALPHA) -> np.ndarray:
    """s (input channels,) float32: activations^alpha / weights^(1 - alpha), 1 for a channel that is always zero."""
    activations, weights = seen.input.channel_absmax, seen.weight_absmax
    used = (activations > 0) & (weights > 0)
    s = np.ones_like(activations)
    s[used] = activations[used] ** alpha / weights[used] ** (1 - alpha)
    return s.clip(1 / MOST, MOST)


def smooth_threshold(seen: LayerStatistics, s: np.ndarray) -> float:
    """The largest magnitude of the smoothed input: the histogram is of the input before, and outliers are gone."""
    return float((seen.input.channel_absmax / s).max(initial=0.0))


def fold_into_modulation(graph: ir.Graph, layer: Layer, s: np.ndarray) -> bool:
    """Divide the layer's input by ``s``, where it comes from a modulation that nothing else reads.

    Returns:
        Whether that was so; if not, the graph is unchanged.
    """
    value = layer.node.inputs[0]
    shifted = value.producer() if value is not None else None
    if value is None or shifted is None or shifted.op_type != "Add" or len(value.uses()) != 1:
        return False
    scaled = next((v for v in shifted.inputs if v is not None and _is_product(v)), None)
    if scaled is None or len(scaled.uses()) != 1:
        return False
    product = scaled.producer()
    assert product is not None
    vectors = [(shifted, _vector(shifted, len(s))), (product, _vector(product, len(s)))]
    if any(index is None for _, index in vectors):
        return False
    inverse = add_initializer(graph, _inverse(s, value, layer.path))
    for node, index in vectors:
        assert index is not None
        vector = node.inputs[index]
        assert vector is not None
        smoothed = ir.node("Mul", [vector, inverse], name=f"{layer.path}/{'shift' if node is shifted else 'scale'}")
        set_module_path(smoothed, module_path(layer.node))
        result = smoothed.outputs[0]
        result.name, result.type, result.shape = smoothed.name, vector.type, vector.shape
        graph.insert_before(node, smoothed)
        node.replace_input_with(index, result)
    return True


def _is_product(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Mul"


def _vector(node: ir.Node, channels: int) -> int | None:
    """Which input of a node is one vector (B, 1, channels) per image."""
    for index, value in enumerate(node.inputs):
        if value is not None and value.shape is not None and len(value.shape) == 3 and value.shape[1:] == (1, channels):
            return index
    return None


def _inverse(s: np.ndarray, like: ir.Value, path: str) -> ir.Tensor:
    assert like.dtype is not None
    return ir.Tensor((1 / s).astype(like.dtype.numpy()), dtype=like.dtype, name=f"{path}/smooth")
