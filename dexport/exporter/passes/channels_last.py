"""Compute pointwise what stands between matrix products over the channels in their layout, without transposes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from dexport.exporter.passes.lazy import add_initializer, lazily, static_shape
from dexport.exporter.passes.pointwise_conv import CHANNELS_FIRST, CHANNELS_LAST
from dexport.exporter.passes.static_reshape import reshape_target
from dexport.exporter.pytorch.module_path import module_path, set_module_path

POINTWISE = frozenset({"Add", "Div", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"})
RANK = 4


class ChannelsLast(ir.passes.InPlacePass):
    """``Op(Transpose(x, first), ..)`` -> ``Transpose(Op(x, ..), first)`` until the transposes meet and cancel.

    Starts at values that are transposed to (B, H, W, C) already, for a norm over the channels or a matrix product, and
    goes on through pointwise operators. Vectors (B, C, 1, 1) that these read are made in the other layout. What else
    reads a value, such as a depthwise convolution, gets it as (B, C, H, W).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layouts = _Layouts(model.graph)
        modified = False
        for node in list(model.graph):
            if _permutes(node, CHANNELS_LAST):
                layouts.drop(node)
            elif _permutes(node, CHANNELS_FIRST):
                layouts.pair(node.outputs[0], node.inputs[0])
            elif _is_pointwise(node) and any(value in layouts.last for value in node.inputs):
                layouts.turn(node)
                modified = True
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


class _Layouts:
    """The values of a graph that exist channels-last.

    Attributes:
        last: value (B, C, H, W) -> the same as (B, H, W, C).
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.last: dict[ir.Value | None, ir.Value] = {}

    def pair(self, first: ir.Value, last: ir.Value | None) -> None:
        assert last is not None
        self.last[first] = last

    def drop(self, transpose: ir.Node) -> None:
        """Replace a transpose to channels-last by the value that is there already, or keep it for later readers."""
        source, result = transpose.inputs[0], transpose.outputs[0]
        known = self.last.setdefault(source, result)
        if known is not result and result not in self.graph.outputs:
            result.replace_all_uses_with(known)
            self.graph.remove(transpose, safe=True)

    def turn(self, node: ir.Node) -> None:
        """Let a node compute channels-last; readers that need them get its outputs transposed back."""
        if node.op_type == "Reshape":
            shape = node.outputs[0].shape
            assert shape is not None
            node.replace_input_with(1, reshape_target(self.graph, [shape[axis] for axis in CHANNELS_LAST]))
        else:
            for index, value in enumerate(node.inputs):
                if value is not None:
                    node.replace_input_with(index, self._as_last(value))
        if node.op_type == "Split":
            node.attributes["axis"] = ir.AttrInt64("axis", RANK - 1)
        for output in node.outputs:
            self._give_back(node, output)

    def _give_back(self, node: ir.Node, output: ir.Value) -> None:
        back = _transpose(node, output, CHANNELS_FIRST, "channels_first")
        back.shape, output.shape = output.shape, _permuted(output.shape)
        if output in self.graph.outputs:
            back.name, output.name = output.name, f"{output.name}/channels_last"
        ir.convenience.replace_all_uses_with(output, back, replace_graph_outputs=True)
        self.graph.insert_after(node, _producer(back))
        _producer(back).replace_input_with(0, output)
        self.last[back] = output

    def _as_last(self, value: ir.Value) -> ir.Value:
        if value in self.last or value.shape is None or len(value.shape) < RANK:
            return self.last.get(value, value)
        producer = value.producer()
        if value.const_value is not None:
            self.last[value] = self._constant(value, value.const_value)
        elif producer is not None and _makes_vectors(producer):
            self.turn(producer)
            return value  # the same object, which is channels-last now
        else:
            turned = _transpose(producer, value, CHANNELS_LAST, "channels_last")
            turned.shape = _permuted(value.shape)
            if producer is None:
                self.graph.insert_before(self.graph[0], _producer(turned))
            else:
                self.graph.insert_after(producer, _producer(turned))
            self.last[value] = turned
        return self.last[value]

    def _constant(self, value: ir.Value, source: ir.TensorProtocol) -> ir.Value:
        shape = [static_shape(source)[axis] for axis in CHANNELS_LAST]
        name = f"{value.name}/channels_last"
        turned = lazily(
            source, lambda t: t.permute(*CHANNELS_LAST).contiguous(), dtype=source.dtype, shape=shape, name=name
        )
        return self.graph.initializers.get(name) or add_initializer(self.graph, turned)


def _permutes(node: ir.Node, permutation: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == permutation


def _is_pointwise(node: ir.Node) -> bool:
    """Only operands of full rank or of one value mean the same in both layouts."""
    shapes = [value.shape for value in (*node.inputs, *node.outputs) if value is not None]
    return (
        node.op_type in POINTWISE
        and node.domain == ""
        and all(s is not None and (len(s) == RANK or all(dim == 1 for dim in s)) for s in shapes)
    )


def _makes_vectors(node: ir.Node) -> bool:
    """Vectors (B, C, 1, 1), by a reshape to that, a split of its channels or arithmetic on such."""
    if any(o.shape is None or len(o.shape) != RANK or o.shape[2:] != (1, 1) for o in node.outputs):
        return False
    if node.op_type == "Reshape":
        shape = node.outputs[0].shape
        assert shape is not None
        return isinstance(shape[1], int)
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) == 1
    return _is_pointwise(node)


def _transpose(near: ir.Node | None, value: ir.Value, permutation: tuple[int, ...], suffix: str) -> ir.Value:
    name = f"{value.name}/{suffix}"
    node = ir.node("Transpose", [value], attributes={"perm": permutation}, name=name)
    set_module_path(node, "" if near is None else module_path(near))
    result = node.outputs[0]
    assert value.dtype is not None
    result.name, result.dtype = name, value.dtype
    return result


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _permuted(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[axis] for axis in CHANNELS_LAST])
