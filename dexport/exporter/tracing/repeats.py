"""Repeated blocks are traced and translated once.

While a network is traced, every block that has an equal is opaque but for the first: the trace holds one ``call`` for
it. The first one is traced as usual, between marks. In the ONNX graph each call is then replaced by a copy of the nodes
between the marks, with the weights of the block that was called. Because every call of every block is recorded where it
happens, it does not matter how blocks are connected.

That a block is equal is not assumed: each one runs where it is called, on stand-ins for tensors, and has to do what the
first one did (:mod:`dexport.exporter.tracing.observe`).
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dexport.exporter.tracing.observe import PLAIN, Irregular, Recording, Rehearsal

DOMAIN = "dexport.trace"
ENTER, LEAVE, CALL = "Enter", "Leave", "Call"
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
HOOKS = "_hooks"
PARTS = frozenset({"_parameters", "_buffers", "_modules"})


@torch.library.custom_op("dexport_trace::enter", mutates_args=())
def _enter(x: Tensor, path: str, index: int) -> Tensor:
    """Marks argument ``index`` of the block at ``path``."""
    raise NotImplementedError


@torch.library.custom_op("dexport_trace::leave", mutates_args=())
def _leave(x: Tensor, path: str, index: int) -> Tensor:
    """Marks result ``index`` of the block at ``path``."""
    raise NotImplementedError


@torch.library.custom_op("dexport_trace::call", mutates_args=())
def _call(arguments: list[Tensor], path: str, like: str, index: int, layout: str) -> Tensor:
    """Result ``index`` of the block at ``path``, which computes as the one at ``like`` does."""
    raise NotImplementedError


@_enter.register_fake
@_leave.register_fake
def _same(x: Tensor, _path: str, _index: int) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@_call.register_fake
def _result(arguments: list[Tensor], _path: str, _like: str, _index: int, layout: str) -> Tensor:
    return Layout.from_json(layout).empty(arguments)


@dataclass(frozen=True)
class Layout:
    """Shape, order in memory and type of a result, in terms of the arguments.

    Attributes:
        dims: sizes from the outermost dimension in memory to the innermost; (argument, axis) for a symbolic one.
        order: the axis that each of them is.
    """

    dims: tuple[int | tuple[int, int], ...]
    order: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, result: Tensor, arguments: Sequence[Tensor]) -> Layout:
        """Raise Irregular for sizes that are not the arguments', and for memory with holes or overlaps."""
        symbols = {str(dim): (n, axis) for n, x in enumerate(arguments) for axis, dim in enumerate(x.shape)}
        strides: Sequence[Any] = result.stride()
        order = sorted(range(result.dim()), key=lambda axis: _number(strides[axis]), reverse=True)
        step: Any = 1
        for axis in reversed(order):
            if str(strides[axis]) != str(step) and str(result.shape[axis]) != "1":
                raise Irregular(f"a block returns a view with strides {tuple(strides)}")
            step = step * result.shape[axis]
        dims = []
        for axis in order:
            dim = result.shape[axis]
            if not isinstance(dim, int) and str(dim) not in symbols:
                raise Irregular(f"a block returns the size {dim}, which none of its arguments has")
            dims.append(dim if isinstance(dim, int) else symbols[str(dim)])
        return cls(tuple(dims), tuple(order), str(result.dtype).removeprefix("torch."))

    def empty(self, arguments: Sequence[Tensor]) -> Tensor:
        sizes = [dim if isinstance(dim, int) else arguments[dim[0]].shape[dim[1]] for dim in self.dims]
        x = torch.empty(sizes, dtype=getattr(torch, self.dtype), device=arguments[0].device)
        return x.permute([self.order.index(axis) for axis in range(len(self.order))])

    def to_json(self) -> str:
        return json.dumps([self.dims, self.order, self.dtype])

    @classmethod
    def from_json(cls, text: str) -> Layout:
        dims, order, dtype = json.loads(text)
        return cls(tuple(dim if isinstance(dim, int) else tuple(dim) for dim in dims), tuple(order), dtype)


def _number(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else size.node.hint


@dataclass
class Traced:
    """The first block of its kind: what it did, and what it gave."""

    path: str
    recording: Recording
    returned: Any
    layouts: list[Layout]


class Repeats:
    """Makes the repeated blocks of a network opaque while it is traced.

    Attributes:
        traced: the first block of each kind, by what a kind is told by.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._blocks = repeated_blocks(root)
        self.traced: dict[Any, Traced] = {}
        self._weights: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    @contextlib.contextmanager
    def opaque(self) -> Iterator[None]:
        """Replace the forward of each of them. What forwards do to the network stays."""
        hook = self._root.register_forward_pre_hook(self._begin)
        for path, block in self._blocks.items():
            block.forward = Opaque(self, path, block, block.forward)
        try:
            yield
        finally:
            hook.remove()
            for block in self._blocks.values():
                del block.forward

    def check(self, program: torch.export.ExportedProgram) -> None:
        """Raise Irregular where a trace has what marks and calls would hide: writes, or values that left a block."""
        for node in program.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise Irregular(f"{node.target} writes into its argument")
        signature = program.graph_signature
        if signature.buffers_to_mutate:
            raise Irregular(f"{', '.join(signature.buffers_to_mutate.values())} changes")
        for name in signature.lifted_tensor_constants:
            if isinstance(program.constants[name], FakeTensor):
                raise Irregular("a value of a block reaches the network by another way than its results")

    def weights_of(self, path: str) -> dict[str, Tensor]:
        prefix = f"{path}."
        return {name.removeprefix(prefix): x for name, x in self._weights.items() if name.startswith(prefix)}

    def _begin(self, _root: nn.Module, _args: Any) -> None:
        """Before a forward, when every weight is under its name, whatever the network will do to it."""
        self.traced.clear()
        self._weights = dict(_tensors(self._root))


@dataclass
class Opaque:
    """The forward of a repeated block while the network is traced."""

    repeats: Repeats
    path: str
    block: nn.Module
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
        if not tensors or not _cannot_change((*args, *kwargs.values())):
            raise Irregular(f"{self.path} is called with something else than tensors and plain values")
        # A tensor that is given twice is one tensor to the block.
        places = [next((n for n, x in enumerate(tensors) if x is leaf), None) for leaf in leaves]
        plain = [None if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves]
        key = (structure_of(self.block), str(spec), repr(places), repr(plain), tuple(map(_meta, tensors)))
        first = self.repeats.traced.get(key)
        if first is None or first.path == self.path:
            marked = [_enter(x, self.path, index) for index, x in enumerate(tensors)]
            recording = Recording(marked, self.repeats.weights_of(self.path))
            returned = self._run(recording, _replaced(leaves, places, marked), spec)
            results, result_spec = pytree.tree_flatten(returned)
            layouts = [Layout.of(result, tensors) for result in results]
            self.repeats.traced[key] = Traced(self.path, recording, returned, layouts)
            left = [_leave(x, self.path, index) for index, x in enumerate(results)]
            return pytree.tree_unflatten(left, result_spec)
        rehearsal = Rehearsal(first.recording, len(tensors), self.repeats.weights_of(self.path))
        returned = self._run(rehearsal, _replaced(leaves, places, rehearsal.arguments), spec)
        if not rehearsal.finished(returned, first.returned):
            raise Irregular(f"{self.path} does something else than {first.path}")
        called = [_call(tensors, self.path, first.path, n, x.to_json()) for n, x in enumerate(first.layouts)]
        return pytree.tree_unflatten(called, pytree.tree_structure(first.returned))

    def _run(self, mode: Recording | Rehearsal, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with mode:
            returned = self.forward(*args, **kwargs)
        weights = self.repeats.weights_of(self.path)
        if any(weights.get(name) is not x for name, x in _tensors(self.block)):
            raise Irregular(f"{self.path} does not use its own weights")
        results = pytree.tree_leaves(returned)
        if not results or not all(isinstance(x, Tensor) for x in results) or not _cannot_change(returned):
            raise Irregular(f"{self.path} returns something else than tensors")
        return returned


def _replaced(leaves: list[Any], places: list[int | None], tensors: Sequence[Tensor]) -> list[Any]:
    return [leaf if place is None else tensors[place] for leaf, place in zip(leaves, places, strict=True)]


def _cannot_change(value: Any) -> bool:
    """Whether there are tensors, plain values and tuples only: through a list, something else could leave a block."""
    if isinstance(value, tuple):
        return all(map(_cannot_change, value))
    return isinstance(value, (Tensor, *PLAIN))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _meta(x: Tensor) -> tuple[str, ...]:
    return (str(tuple(x.shape)), str(x.stride()), str(x.dtype), str(x.requires_grad))


def repeated_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, the outermost modules with children that have an equal before the network runs.

    A block that shares a parameter with anything else, or has hooks, is left out.
    """
    owners: dict[int, int] = {}
    for _, tensor in _tensors(root):
        owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    structures = {}
    for path, module in root.named_modules():
        tensors = (*module.parameters(), *module.buffers())
        if path and tensors and any(module.children()) and all(owners[id(tensor)] == 1 for tensor in tensors):
            structure = structure_of(module)
            if structure is not None and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                structures[path] = (module, structure)
    counts: dict[Any, int] = {}
    for _, structure in structures.values():
        counts[structure] = counts.get(structure, 0) + 1
    blocks: dict[str, nn.Module] = {}
    for path, (module, structure) in structures.items():
        inside_another = any(path.startswith(f"{other}.") for other in blocks)
        if counts[structure] > 1 and not inside_another:
            blocks[path] = module
    return blocks


def structure_of(module: nn.Module) -> Any:
    """What a module is, except for the values of its tensors; None where hooks decide what it computes, too.

    What is neither a plain value nor a container of such is compared by identity.
    """
    plain = []
    for name, value in sorted(vars(module).items()):
        if name.endswith(HOOKS) and value:
            return None
        if name not in PARTS and not name.endswith(HOOKS) and not isinstance(value, Opaque):
            plain.append((name, _plain(value)))
    tensors = [
        (name, None if x is None else (tuple(x.shape), x.stride(), x.dtype, x.requires_grad, type(x)))
        for name, x in (*module._parameters.items(), *module._buffers.items())
    ]
    children = [(name, child and structure_of(child)) for name, child in module._modules.items()]
    if any(child is None and module._modules[name] is not None for name, child in children):
        return None
    return (type(module), tuple(plain), tuple(tensors), tuple(children))


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return (type(value), repr(value))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_plain, value)))
    if isinstance(value, (set, frozenset)):
        return (type(value), tuple(sorted(map(repr, value))) if all(isinstance(v, PLAIN) for v in value) else id(value))
    if isinstance(value, dict):
        return (type(value), tuple((_plain(key), _plain(item)) for key, item in value.items()))
    return (type(value), id(value))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How marks and calls become ONNX nodes."""
    operators = torch.ops.dexport_trace
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds = onnx.defs.OpSchema.AttrType
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)", "tensor(int64)", "tensor(bool)"]

    def op(name: str, *strings: str) -> Any:
        schema = onnx.defs.OpSchema(
            name,
            DOMAIN,
            1,
            inputs=[parameter("x", "T", param_option=parameter_variadic, is_homogeneous=False)],
            outputs=[parameter("result", "T")],
            type_constraints=[("T", types, "any")],
            attributes=[
                *(attribute(string, kinds.STRING, required=True) for string in strings),
                attribute("index", kinds.INT, required=True),
            ],
        )
        return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)

    parameter_variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    enter, leave, call = op(ENTER, "path"), op(LEAVE, "path"), op(CALL, "path", "like")
    return {
        operators.enter.default: lambda x, path, index: enter(x, path=path, index=index),
        operators.leave.default: lambda x, path, index: leave(x, path=path, index=index),
        operators.call.default: lambda xs, path, like, index, _layout: call(*xs, path=path, like=like, index=index),
    }


def expand(model: ir.Model) -> None:
    """Replace every call by a copy of the nodes that it stands for, and remove the marks.

    Raises:
        Irregular: a block's values are used past its end, or its marks are not in one place.
    """
    graph = model.graph
    bodies = _find_bodies(graph)
    copies: dict[tuple[str, tuple[ir.Value | None, ...]], dict[int, ir.Value]] = {}
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != CALL:
            continue
        path = node.attributes.get_string("path")
        key = (path, tuple(node.inputs))
        if key not in copies:
            body = bodies[node.attributes.get_string("like")]
            copies[key] = body.copy(graph, node, path, f"{path}#{len(copies)}")
        index = _index(node)
        if index not in copies[key]:
            raise Irregular(f"result {index} of {node.attributes.get_string('like')} is used in a copy only")
        _stands_for(copies[key][index], node.outputs[0])
        graph.remove(node, safe=True)
    for body in bodies.values():
        body.remove_marks(graph)
    model.opset_imports.pop(DOMAIN, None)


@dataclass
class Body:
    """The nodes of a block between its marks; marks of arguments and results that are not used are not there."""

    path: str
    enters: list[ir.Node]
    nodes: list[ir.Node]
    leaves: list[ir.Node]

    def share_invariants(self) -> None:
        """Leave out of the copies what depends on neither arguments nor weights and is used elsewhere too.

        The batch size and its multiples are computed where they are needed first, and reused from then on.
        """
        inside = {*self.nodes, *self.leaves}
        own = {enter.outputs[0] for enter in self.enters}
        shared: set[ir.Node] = set()
        for node in self.nodes:
            if node.domain == DOMAIN or any(attribute.type in SUBGRAPHS for attribute in node.attributes.values()):
                raise Irregular(f"{self.path} holds {node.op_type}")
            varies = any(value in own or self._is_weight(value) for value in node.inputs)
            if varies:
                own.update(node.outputs)
            if any(use.node not in inside for value in node.outputs for use in value.uses()):
                if varies:
                    raise Irregular(f"{node.name} of {self.path} is used outside of it")
                shared.add(node)
        for enter in self.enters:
            if any(use.node not in inside for use in enter.outputs[0].uses()):
                raise Irregular(f"an argument of {self.path} is used outside of it")
        for node in reversed(self.nodes):
            if node in shared:
                shared.update(producer for value in node.inputs if value and (producer := value.producer()))
        self.nodes = [node for node in self.nodes if node not in shared]

    def _is_weight(self, value: ir.Value | None) -> bool:
        return value is not None and value.is_initializer() and str(value.name).startswith(f"{self.path}.")

    def copy(self, graph: ir.Graph, call: ir.Node, path: str, suffix: str) -> dict[int, ir.Value]:
        """Insert a copy before ``call`` and return its results by their index."""
        values = {enter.outputs[0]: _given(call.inputs[_index(enter)]) for enter in self.enters}
        for node in self.nodes:
            inputs = [None if value is None else self._twin(graph, value, values, path) for value in node.inputs]
            copied = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}:{suffix}",
                metadata_props=self._moved_scopes(node.metadata_props, path),
            )
            for old, new in zip(node.outputs, copied.outputs, strict=True):
                new.name = f"{old.name}:{suffix}"
                _describe_as(new, old)
                values[old] = new
            graph.insert_before(call, copied)
        return {_index(leave): self._twin(graph, _given(leave.inputs[0]), values, path) for leave in self.leaves}

    def _twin(self, graph: ir.Graph, value: ir.Value, values: dict[ir.Value, ir.Value], path: str) -> ir.Value:
        """What the copy uses in place of ``value``: a copy, a weight of its own, or the same value from outside."""
        if value in values:
            return values[value]
        if not self._is_weight(value):
            return value
        own = path + str(value.name).removeprefix(self.path)
        if own not in graph.initializers:
            # The exporter leaves out weights that no call reads. Its values have no bytes yet, so they may be shared.
            weight = ir.Value(name=own, const_value=value.const_value)
            _describe_as(weight, value)
            graph.register_initializer(weight)
        return graph.initializers[own]

    def _moved_scopes(self, metadata: Mapping[str, str], path: str) -> dict[str, str]:
        """A list of module paths, such as 'blocks.0' or 'blocks.0.attn', ends in the operator's name."""
        moved = dict(metadata)
        if NAME_SCOPES in moved:
            scopes = ast.literal_eval(moved[NAME_SCOPES])
            inside = (scope == self.path or scope.startswith(f"{self.path}.") for scope in scopes)
            own = [path + s.removeprefix(self.path) if i else s for s, i in zip(scopes, inside, strict=True)]
            moved[NAME_SCOPES] = repr(own)
        return moved

    def remove_marks(self, graph: ir.Graph) -> None:
        for mark in (*self.enters, *self.leaves):
            _stands_for(_given(mark.inputs[0]), mark.outputs[0])
            graph.remove(mark, safe=True)


def _stands_for(value: ir.Value, other: ir.Value) -> None:
    """Use it in the other's place, and under the other's name where that is an output of the graph."""
    if other.is_graph_output():
        if value.is_graph_output() or value.producer() is None:
            raise Irregular(f"the output {other.name} is {value.name} as well")
        value.name = other.name
    other.replace_all_uses_with(value, replace_graph_outputs=True)


def _describe_as(value: ir.Value, other: ir.Value) -> None:
    """Give it the other's type and shape, as objects of its own: onnx-ir changes them in place."""
    value.type, value.shape = copy.deepcopy(other.type), other.shape and other.shape.copy()


def _find_bodies(graph: ir.Graph) -> dict[str, Body]:
    bodies: dict[str, Body] = {}
    current: Body | None = None
    for node in graph:
        is_mark = node.domain == DOMAIN and node.op_type in (ENTER, LEAVE)
        path = node.attributes.get_string("path") if is_mark else ""
        if is_mark and node.op_type == ENTER and (current is None or current.leaves):
            if path in bodies:
                raise Irregular(f"{path} runs more than once")
            current = bodies[path] = Body(path, [], [], [])
        if is_mark and (current is None or current.path != path):
            raise Irregular(f"the marks of {path} are not in one place")
        if is_mark and current is not None:
            (current.enters if node.op_type == ENTER else current.leaves).append(node)
        elif current is not None and not current.leaves and any(value is not None for value in node.inputs):
            current.nodes.append(node)  # constants, which have no inputs, are shared
    for body in bodies.values():
        body.share_invariants()
    return bodies


def _index(mark: ir.Node) -> int:
    return mark.attributes.get_int("index")


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
