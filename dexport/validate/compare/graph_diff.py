"""What differs between the graph of a file and the one that an export writes, node by node and weight by weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dexport.exporter.pytorch.module_path import module_path

SAME_FACTOR = 2e-3
"""Spread of the quotient of two weights up to which one is a multiple of the other: two roundings to float16."""


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        node: the node, or the first reader of the weight.
        module: path of its module.
        what: ``weight``, ``attribute``, ``operator``, ``inputs``, ``outputs``, ``type``, ``missing``, ``extra``,
            ``function`` or ``graph``.
        text: what is there and what was expected.
    """

    node: str
    module: str
    what: str
    text: str

    @property
    def decisive(self) -> bool:
        """Whether this alone is a fault: other differences may be another way to compute the same."""
        return self.what in ("weight", "attribute")


def differences(expected: ir.Model, actual: ir.Model) -> list[Difference]:
    """Everything that differs; empty where both compute the same by construction. Reads one weight at a time."""
    return [*_nodes(expected.graph, actual.graph), *_weights(expected.graph, actual.graph), *_rest(expected, actual)]


def _nodes(expected: ir.Graph, actual: ir.Graph) -> Iterator[Difference]:
    wanted = {str(node.name): node for node in expected}
    for node in actual:
        name = str(node.name)
        other = wanted.pop(name, None)
        if other is None:
            yield Difference(name, module_path(node), "extra", f"{name} is not in the export")
            continue
        for what, text in _of_node(other, node):
            yield Difference(name, module_path(node), what, text)
    for name, node in wanted.items():
        yield Difference(name, module_path(node), "missing", f"{name} of the export is not there")


def _of_node(expected: ir.Node, actual: ir.Node) -> Iterator[tuple[str, str]]:
    operators = [f"{node.domain}::{node.op_type}".removeprefix("::") for node in (actual, expected)]
    if operators[0] != operators[1]:
        yield "operator", f"operator {operators[0]}, expected {operators[1]}"
    for name in sorted({*expected.attributes, *actual.attributes}):
        texts = [_attribute(node.attributes.get(name)) for node in (actual, expected)]
        if texts[0] != texts[1]:
            yield "attribute", f"attribute {name} is {texts[0]}, expected {texts[1]}"
    for what in ("inputs", "outputs"):
        names = [[value and value.name for value in getattr(node, what)] for node in (actual, expected)]
        if names[0] != names[1]:
            pairs = [f"{a}, expected {b}" for a, b in itertools.zip_longest(*names) if a != b]
            yield what, f"{what.removesuffix('s')} " + "; ".join(pairs)
    types = [[value.dtype and value.dtype.name for value in node.outputs] for node in (actual, expected)]
    if types[0] != types[1]:
        yield "type", f"type {', '.join(map(str, types[0]))}, expected {', '.join(map(str, types[1]))}"


def _attribute(attribute: ir.Attr | None) -> str:
    if attribute is None:
        return "absent"
    simple = isinstance(attribute.value, (int, float, str)) or (
        isinstance(attribute.value, (list, tuple)) and not any(hasattr(value, "nodes") for value in attribute.value)
    )
    if not simple:  # a tensor or a graph
        return str(ir.serde.serialize_attribute(attribute))
    return f"{attribute.value:g}" if isinstance(attribute.value, float) else repr(attribute.value)


def _weights(expected: ir.Graph, actual: ir.Graph) -> Iterator[Difference]:
    for name, value in actual.initializers.items():
        other = expected.initializers.get(name)
        readers = [use.node for use in value.uses()]
        if other is None or other.const_value is None or value.const_value is None or not readers:
            continue
        text = _compare_tensors(other.const_value, value.const_value)
        if text:
            yield Difference(str(readers[0].name), module_path(readers[0]), "weight", f"{name} {text}")


def _compare_tensors(expected: ir.TensorProtocol, actual: ir.TensorProtocol) -> str:
    """What differs, or nothing."""
    if expected.dtype != actual.dtype or list(expected.shape) != list(actual.shape):
        return (
            f"is {actual.dtype.name} {list(actual.shape.numpy())}, "
            f"expected {expected.dtype.name} {list(expected.shape.numpy())}"
        )
    want, got = expected.numpy(), actual.numpy()
    if want.tobytes() == got.tobytes():
        return ""
    for axes in itertools.permutations(range(want.ndim)):
        if list(axes) == sorted(axes) or want.transpose(axes).shape != got.shape:
            continue
        if np.array_equal(want.transpose(axes), got):
            return f"is transposed: its axes are {list(axes)} of the expected one's"
    exact, there = want.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    differing = np.flatnonzero(exact != there)
    if not len(differing):  # 0 and -0
        return ""
    norm = np.linalg.norm(exact)
    error = np.linalg.norm(there - exact) / norm if norm else np.inf
    text = f"differs from the checkpoint's by {error:.1e} relative L2, in {len(differing)} of {exact.size} values"
    used = exact != 0
    quotients = there[used] / exact[used]
    factor = float(np.median(quotients)) if len(quotients) else 1.0
    if exact.size > 1 and factor != 1 and np.allclose(there, factor * exact, rtol=SAME_FACTOR, atol=0):
        return f"{text}: all of them times {factor:.4g}"
    if len(differing) == 1:
        place = tuple(int(index) for index in np.unravel_index(differing[0], want.shape))
        return f"{text}: {there[differing[0]]:.6g} at {list(place)}, expected {exact[differing[0]]:.6g}"
    return text


def _rest(expected: ir.Model, actual: ir.Model) -> Iterator[Difference]:
    for name, function in actual.functions.items():
        other = expected.functions.get(name)
        if other is None or ir.serde.serialize_function(other) != ir.serde.serialize_function(function):
            caller = next((node for node in actual.graph if node.op_identifier() == name), None)
            where = (str(caller.name), module_path(caller)) if caller else ("", "")
            yield Difference(*where, "function", f"the function {name[1]} has another body")
    if dict(expected.opset_imports) != dict(actual.opset_imports):
        text = f"opsets {dict(actual.opset_imports)}, expected {dict(expected.opset_imports)}"
        yield Difference("", "", "graph", text)
    outputs = [[value.name for value in model.graph.outputs] for model in (actual, expected)]
    if outputs[0] != outputs[1]:
        yield Difference("", "", "graph", f"outputs {outputs[0]}, expected {outputs[1]}")
