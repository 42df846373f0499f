"""Bytes of the ONNX file that an assignment of schemes would give, from the graph alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dexport.bundle import MODEL_DATA
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.lazy import static_shape
from dexport.exporter.quantize.gptq import int4_block
from dexport.exporter.quantize.layers import NetworkLayer
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.rounded import RoundedWeights
from dexport.exporter.quantize.schemes import INT4, INT8, TERNARY

INLINE_BYTES = 256
"""Smaller tensors are saved inside ``model.onnx``."""
NODE_BYTES = 500
"""About what the nodes and names of a quantised layer take."""
BITS = {"packed": 2, "nbits2": 2, "int4": 4, "nbits4": 4, "int8": 8}
"""Per value, by carrier."""


@dataclass(frozen=True)
class FileSizes:
    """Sizes of the files that come from one graph.

    Attributes:
        model: the graph before quantisation, in the build's precision.
    """

    model: ir.Model
    rounded: RoundedWeights
    carriers: Mapping[str, str]

    def of(self, schemes: Mapping[str, str]) -> int:
        """Bytes of ``model.onnx`` and ``model.onnx.data`` together."""
        model = self.model.clone()
        Plan(schemes, rounded=self.rounded, carriers=self.carriers).apply(model)
        AttachFunctions()(model)
        stored = 0
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_BYTES:
                zeros = np.zeros(static_shape(tensor), tensor.dtype.numpy())
                value.const_value = ir.Tensor(zeros, dtype=tensor.dtype, name=str(value.name))
                continue
            value.const_value = ir.ExternalTensor(
                MODEL_DATA,
                stored,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(static_shape(tensor)),
                name=str(value.name),
            )
            stored += tensor.nbytes
        return stored + ir.to_proto(model).ByteSize()

    def estimate(self, layer: NetworkLayer, scheme: str, bytes_per_weight: int) -> int:
        """Bytes of one layer, without those of its node."""
        if scheme == INT8:
            return layer.values + layer.rows * bytes_per_weight + NODE_BYTES
        if scheme not in (INT4, TERNARY):
            return layer.values * bytes_per_weight
        blocks = -(-layer.columns // int4_block(layer.columns)) if scheme == INT4 else 1
        codes = layer.values * BITS[self.carriers[scheme]] // 8
        return codes + layer.rows * blocks * bytes_per_weight + NODE_BYTES
