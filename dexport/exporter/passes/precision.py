"""Convert a float32 graph to float16 or bfloat16 around float32 islands, with explicit casts.

TensorRT 11 is strongly typed: precision is what the graph says, so this pass decides it for every node.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from dexport.errors import InputError
from dexport.exporter.passes.lazy import add_initializer, as_torch, lazily, static_shape
from dexport.exporter.pytorch.module_path import GUIDANCE, TIME_TABLE, inside, module_path, set_module_path
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.weights.source import is_finite

LOW_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TORCH_TYPES = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
DATA_MOVEMENT = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Operators that compute nothing: they move float32 only when everything that reads them computes in it."""
FLOAT32_INPUTS = {"Resize": (1, 2)}
"""Operator -> inputs that the standard fixes to float32, such as the scales of Resize."""
ON_MASKS = DATA_MOVEMENT | {"Add", "Cast", "Max", "Min", "Mul", "Sub", "Trilu", "Where"}
"""Operators between a mask and the softmax."""
ATTENTION_MASK = 3
"""Input of ONNX's ``Attention``."""
SHAPE_QUERIES = frozenset({"Shape", "Size"})


class ToLowPrecision(ir.passes.InPlacePass):
    """Low precision everywhere except in the islands; graph inputs and outputs keep their float32.

    The softmax inside an ``Attention`` node is the runtime's: fused kernels accumulate it in float32, and the attribute
    that would ask for it (``softmax_precision``) is refused by TensorRT-RTX 1.7.

    Args:
        precision: ``fp16`` or ``bf16``.
        islands: what stays in float32, and with it the arithmetic of a fused guidance, which amplifies rounding, and
            of the look-up of a time.
    """

    def __init__(self, precision: str, islands: Islands) -> None:
        self.low = LOW_TYPES[precision]
        self.islands = islands

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        high = self._nodes_in_float32(graph)
        casts = _Casts(graph, self.low)
        for node in list(graph):
            if node.op_type in SHAPE_QUERIES:
                continue
            wanted = ir.DataType.FLOAT if node in high else self.low
            for index, value in enumerate(node.inputs):
                if index in FLOAT32_INPUTS.get(node.op_type, ()):
                    continue
                if value is not None and value.dtype in (ir.DataType.FLOAT, self.low) and value.dtype != wanted:
                    node.replace_input_with(index, casts.converted(value, wanted))
            self._set_output_types(node, wanted)
        for index, output in enumerate(graph.outputs):
            if output.dtype == self.low:
                graph.outputs[index] = casts.restored_output(output)
        casts.settle_weight_names()
        return ir.passes.PassResult(model, modified=True)

    def _nodes_in_float32(self, graph: ir.Graph) -> set[ir.Node]:
        high = self._under_masks(graph)
        for node in reversed(graph):
            readers = {use.node for use in node.outputs[0].uses()}
            moves_for_islands = node.op_type in DATA_MOVEMENT and readers and readers <= high
            if self._is_island(node) or moves_for_islands:
                high.add(node)
        return high

    def _under_masks(self, graph: ir.Graph) -> set[ir.Node]:
        """What adds a mask of huge numbers to scores, where the softmax is an island: it belongs to that.

        A number that fits would mask as well, but for rows that are masked as a whole: these are uniform only where
        the scores are lost beside the mask. Such masks are few and small, so this pass looks at their values.
        """
        nodes: set[ir.Node] = set()
        if "Softmax" not in self.islands.ops:
            return nodes
        for value in graph.initializers.values():
            between, ends = _until_softmax(value)
            if ends == {"Softmax"} and between and value.dtype == ir.DataType.FLOAT and value.const_value is not None:
                array = as_torch(value.const_value)
                if (array.to(TORCH_TYPES[self.low]).isinf() & array.isfinite()).any():
                    nodes |= between
        return nodes

    def _is_island(self, node: ir.Node) -> bool:
        path = module_path(node)
        return node.op_type in self.islands.ops or any(
            inside(path, pattern) for pattern in (*self.islands.modules, *self.islands.optional, GUIDANCE, TIME_TABLE)
        )

    def _set_output_types(self, node: ir.Node, wanted: ir.DataType) -> None:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
            # The network's own cast to float32, for instance of an integer input.
            node.attributes["to"] = ir.AttrInt64("to", wanted)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.type = ir.TensorType(wanted)  # other values, and clones of the graph, may share the old one


class _Casts:
    """Converted versions of values, one per value and type: a Cast node, or a lazily cast weight."""

    def __init__(self, graph: ir.Graph, low: ir.DataType) -> None:
        self.graph = graph
        self.low = low
        self._converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def converted(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = (value, dtype)
        if key not in self._converted:
            weight = value.const_value if value.is_initializer() else None
            self._converted[key] = self._cast(value, dtype) if weight is None else self._cast_weight(weight, value)
        return self._converted[key]

    def restored_output(self, output: ir.Value) -> ir.Value:
        """A float32 value under the output's name; the low-precision one steps aside."""
        name = output.name
        output.name = f"{name}/{_short(self.low)}"
        restored = self._cast(output, ir.DataType.FLOAT)
        restored.name = name
        return restored

    def settle_weight_names(self) -> None:
        """Drop float32 weights that nothing reads any more; the converted one takes over the official name."""
        initializers = self.graph.initializers
        for (value, _), converted in self._converted.items():
            if converted.is_initializer() and not value.uses() and value not in self.graph.outputs:
                name = str(value.name)
                del initializers[name]
                del initializers[str(converted.name)]
                converted.name = name
                initializers.add(converted)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}/to_{_short(dtype)}"
        node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
        result = node.outputs[0]
        result.name, result.dtype, result.shape = name, dtype, value.shape
        producer = value.producer()
        if producer is None:
            readers = {use.node for use in value.uses()}
            self.graph.insert_before(next(n for n in self.graph if n in readers), node)
        else:
            set_module_path(node, module_path(producer))
            self.graph.insert_after(producer, node)
        return result

    def _cast_weight(self, weight: ir.TensorProtocol, value: ir.Value) -> ir.Value:
        original, target = str(value.name), TORCH_TYPES[self.low]
        is_mask = bool(_until_softmax(value)[1])

        def cast(array: Tensor) -> Tensor:
            result = array.to(target)
            if is_finite(result):
                return result
            if array.isnan().any():
                raise InputError(f"{original} holds NaN", hint="check the checkpoint, or the table in its constructor")
            given, own = torch.finfo(array.dtype), torch.finfo(target)
            lost = result.isinf() & array.isfinite()  # what was infinite is a mask, and stays so
            if is_mask and bool((array[lost] < 0).all()):
                # Not infinity: 0 times it is NaN, and so is a row that is masked as a whole. Nor the lowest number,
                # which becomes infinity where a score is added.
                return result.masked_fill_(lost, own.min / 2)
            for before, after in ((given.max, own.max), (given.min, own.min)):
                result.masked_fill_(array == before, after)  # code that asks for its type's limits asks for these
            lost &= result.isinf()
            if not lost.any():
                return result
            raise InputError(
                f"{original} holds {array[lost].abs().max():.3g}, more than {target} can represent",
                hint="build with --bf16, or keep its module in float32 with --island",
            )

        shape = static_shape(weight)
        name = f"{original}/{_short(self.low)}"
        return add_initializer(self.graph, lazily(weight, cast, dtype=self.low, shape=shape, name=name))


def _until_softmax(value: ir.Value) -> tuple[set[ir.Node], set[str]]:
    """What lies between a value and the softmax that it masks: the nodes, and in which operators their paths end.

    Empty for a value that does anything else. In a softmax large negative numbers stand for "never".
    """
    waiting, between, ends = [value], set[ir.Node](), set[str]()
    while waiting:
        current = waiting.pop()
        if current.is_graph_output():
            return set(), set()
        for node, index in current.uses():
            if node.op_type == "Softmax" or (node.op_type == "Attention" and index == ATTENTION_MASK):
                ends.add(node.op_type)
            elif node.op_type not in ON_MASKS:
                return set(), set()
            elif node not in between:
                between.add(node)
                waiting += node.outputs
    return between, ends


def _short(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def precision_map(model: ir.Model) -> dict[str, str]:
    """Node name -> type it computes in, for every node with a floating-point or int8 output; casts are left out."""
    computing = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8}
    return {
        str(node.name): dtype.numpy().name
        for node in model.graph
        if (dtype := node.outputs[0].dtype) in computing and node.op_type != "Cast"
    }
