"""Name nodes and values after the module that they come from: ``blocks.3.attn.qkv/MatMul``."""

from __future__ import annotations

import itertools
from collections import Counter

import onnx_ir as ir

from dexport.exporter.passes.static_reshape import TARGET
from dexport.exporter.pytorch.module_path import METADATA_KEY, module_path, path_of_producer, set_module_path

CONSTANT = "constant"


class NameByModule(ir.passes.InPlacePass):
    """``<module path>/<operator>``, with ``_1``, ``_2`` ... where a module has several. Graph inputs, outputs and
    weights keep their names; small constants are numbered in the order of their first use. No two are called the same.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        seen: Counter[str] = Counter()
        kept = _kept_names(model.graph)
        outputs = set(model.graph.outputs)
        for node in model.graph:
            path = module_path(node) if METADATA_KEY in node.metadata_props else path_of_producer(node)
            base = f"{path}/{node.op_type}" if path else node.op_type
            set_module_path(node, path)
            names: list[str] = []
            while not names or not kept.isdisjoint(names):
                name = base if not seen[base] else f"{base}_{seen[base]}"
                seen[base] += 1
                names = [name] if len(node.outputs) == 1 else [f"{name}.{n}" for n in range(len(node.outputs))]
            node.name = name
            for value, own in zip(node.outputs, names, strict=True):
                if value not in outputs:
                    value.name = own
        _number_constants(model.graph)
        return ir.passes.PassResult(model, modified=True)


def _kept_names(graph: ir.Graph) -> set[str]:
    weights = (value for value in graph.initializers.values() if not _is_anonymous(value))
    return {str(value.name) for value in (*graph.inputs, *graph.outputs, *weights)}


def _number_constants(graph: ir.Graph) -> None:
    used = dict.fromkeys(value for node in graph for value in node.inputs if value is not None)
    constants = [value for value in used if value.is_initializer() and _is_anonymous(value)]
    for value in constants:
        del graph.initializers[str(value.name)]
    kept = _kept_names(graph)
    names = (name for number in itertools.count() if (name := f"{CONSTANT}_{number}") not in kept)
    for value, name in zip(constants, names, strict=False):
        value.name = name
        graph.register_initializer(value)


def _is_anonymous(value: ir.Value) -> bool:
    """Weights are lazy, tables are torch's, and the targets of Reshape have a name that says what they are."""
    return isinstance(value.const_value, ir.Tensor) and not str(value.name).startswith(TARGET)
