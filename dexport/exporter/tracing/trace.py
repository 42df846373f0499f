"""From a PyTorch module to ONNX without memory for its weights.

``torch.export`` runs on fake tensors; the ONNX graph that comes out has every weight as a lazy tensor that reads from
the checkpoint when, and only when, its bytes are written. Of blocks that are equal one is traced.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dexport.collector import collector_paused
from dexport.errors import InputError
from dexport.exporter.ports import check_graph
from dexport.exporter.pytorch.module_path import path_of_producer, set_module_path
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.recipe import BATCH, Signature
from dexport.exporter.tracing.decompose import decompose
from dexport.exporter.tracing.repeats import Repeats, expand, translations
from dexport.exporter.untraceable import explained
from dexport.exporter.variant import Variant
from dexport.exporter.weights.source import WeightSource
from dexport.plugins.translation import translation_table

DEFAULT_OPSET = 23
logger = logging.getLogger(__name__)
TRACED_BATCH = 3
"""A size of 1 would be specialised."""


@collector_paused()
@fresh_torch()
def trace(
    variant: Variant, weights: WeightSource, *, opset: int = DEFAULT_OPSET, every_block: bool = False
) -> ir.Model:
    """Trace the variant with a symbolic batch.

    Args:
        every_block: trace each block by itself, however many are equal, and leave decomposing to torch; the result is
            the same.

    Returns:
        A model whose initializers carry official parameter names and lazy values, whose nodes carry their module path
        under the key of :mod:`dexport.exporter.pytorch.module_path`, and whose batch dimension is ``B``.
    """
    network = Fake(variant)
    repeats = None if every_block else Repeats(network.root)
    model = _repeats_once(network, repeats, opset) if repeats else None
    if model is None and not every_block:
        network = Fake(variant) if repeats else network  # a forward may have left anything behind
        with explained(network.owner, network.own):
            model = _decomposed_here(network, opset)
    if model is None:
        network = network if every_block else Fake(variant)
        with explained(network.owner, network.own):
            model = _to_onnx(_export(network), network.signature, opset)
    _rename_batch(model)
    _record_module_paths(model, network)
    _bind_weights(model, network, weights, variant.outline)
    check_graph(network.owner, model, network.signature)
    return model


class Fake:
    """A variant's network on fake tensors, in the module that is exported, with inputs for it."""

    def __init__(self, variant: Variant) -> None:
        self.owner, self.signature, self.around = variant.recipe.name, variant.signature, variant.around
        with FakeTensorMode():
            self.own = network = variant.module()
            self.root = Exported(variant.wrap(network)).eval()
            self.inputs = tuple(
                torch.zeros(spec.dims(TRACED_BATCH), dtype=getattr(torch, spec.dtype)) for spec in self.signature.inputs
            )
        self.path = next(path for path, module in self.root.named_modules() if module is network)
        _check_names(network)


def _check_names(network: nn.Module) -> None:
    """Raise InputError for a module or weight that an attribute of its owner hides: torch cannot reach it by name."""
    for path, module in network.named_modules():
        for name, own in (*module._modules.items(), *module._parameters.items(), *module._buffers.items()):
            if getattr(module, name, None) is not own:
                raise InputError(
                    f"{path}.{name}".removeprefix(".")
                    + f" has the name of an attribute of {type(module).__name__}, which hides it from torch.export",
                    hint=f"give {name} another name in the network, and rename it in the checkpoint",
                )


class Exported(nn.Module):
    """Keeps the names of a network one level below those of the modules that torch makes of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)


def _repeats_once(network: Fake, repeats: Repeats, opset: int) -> ir.Model | None:
    """The ONNX graph from one trace of each distinct block; None for a network where that cannot be done."""
    try:
        with explained(network.owner, network.own):
            with repeats.opaque():
                program = _export(network)
            repeats.check(program)
            decompose(program)
            model = _to_onnx(program, network.signature, opset)
            expand(model)
    except Exception as error:  # noqa: BLE001 - whatever it is, the whole trace does without it or says it better
        logger.info("every block is traced: %s", error)
        return None
    return model


def _decomposed_here(network: Fake, opset: int) -> ir.Model | None:
    """The ONNX graph without torch's second trace; None for a network that needs it after all."""
    program = _export(network)
    try:
        decompose(program)
        return _to_onnx(program, network.signature, opset)
    except Exception as error:  # noqa: BLE001 - as above
        logger.info("torch decomposes the program: %s", error)
        return None


def _export(network: Fake) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH)
    dynamic_shapes = tuple(
        {axis: batch for axis, dim in enumerate(spec.shape) if dim == BATCH} for spec in network.signature.inputs
    )
    with _quiet():
        return torch.export.export(network.root, network.inputs, dynamic_shapes=(dynamic_shapes,))


def _to_onnx(program: torch.export.ExportedProgram, signature: Signature, opset: int) -> ir.Model:
    names = _hide_names(program)
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            custom_translation_table={**translation_table(), **translations()},
        )
    assert onnx_program is not None
    model = onnx_program.model
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in values:
        value.name = names.get(str(value.name), value.name)
        model.graph.register_initializer(value)
    return model


def _hide_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Number the weights and constants of a program, as torch writes code from their names.

    Returns:
        Number -> name.
    """
    known = {**program.state_dict, **program.constants}
    numbers: dict[str, str] = {}
    for spec in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
        if spec.target in known:
            spec.target = numbers.setdefault(spec.target, f"weight_{len(numbers)}")
    for tensors in (program.state_dict, program.constants):
        named = {numbers.get(name, name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(named)
    return {number: name for name, number in numbers.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter announces absent torchvision operators, which no backbone here uses.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rename_batch(model: ir.Model) -> None:
    """Give the exporter's symbol for the batch (``s77``) its name in every shape and expression."""
    symbol = str(next(v.shape[0] for v in model.graph.inputs if v.shape is not None and len(v.shape) > 0))
    values = [*model.graph.inputs, *(out for node in model.graph.all_nodes() for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else str(d.value or "").replace(symbol, BATCH) or None for d in value.shape]
            )


def _record_module_paths(model: ir.Model, network: Fake) -> None:
    """Keep of the exporter's metadata the module path only; a node without one belongs where its input came from."""
    modules = dict(network.root.named_modules(remove_duplicate=False))
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.metadata_props.clear()
        if scopes:
            # The last scope is the operator itself.
            path = next((scope for scope in reversed(scopes[:-1]) if scope in modules), "")
            set_module_path(node, _inside_network(path, network.path, network.around))
        else:
            set_module_path(node, path_of_producer(node))


def _inside_network(path: str, network_path: str, around: str) -> str:
    """A path in the exported module as a path in the network; what is around the network has a path of its own."""
    if path == network_path:
        return ""
    prefix = network_path + "."
    return path.removeprefix(prefix) if path.startswith(prefix) else around


def _bind_weights(model: ir.Model, network: Fake, weights: WeightSource, outline: nn.Module) -> None:
    """Replace the fake values of all initializers by lazy ones, under their official names and in their order.

    Those that are not fake are constants of the forward.
    """
    dtypes = {name: tensor.dtype for name, tensor in outline.state_dict().items()}
    tables = {name: buffer for name, buffer in outline.named_buffers() if name not in dtypes}
    named = (*network.root.named_parameters(), *network.root.named_buffers())
    order = {name: index for index, (name, _) in enumerate(named)}
    graph = model.graph
    ports = {str(value.name) for value in (*graph.inputs, *graph.outputs)}
    values = sorted(graph.initializers.values(), key=lambda value: order.get(str(value.name), len(order)))
    graph.initializers.clear()
    taken: set[str] = set()
    others = [out for node in graph.all_nodes() for out in node.outputs]
    for value in values:
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, FakeTensor):
            official = str(value.name).removeprefix(f"{network.path}.")
            value.name = name_of_weight(official, ports)
            value.const_value = _bound(official, value.name, dtypes, tables, weights)
            taken.add(value.name)
        else:
            others.append(value)
    for value in others:
        if value.name in taken:
            value.name = f"{value.name}/value"
    for value in values:
        graph.register_initializer(value)


def name_of_weight(official: str, ports: Collection[str]) -> str:
    """The name of a weight in the graph: the official one, unless others are called so.

    Ports are, and what dexport names by a slash. No part of an official name is empty, so that these names are free.
    """
    return f".{official}" if official in ports else official.replace("/", "..")


def _bound(
    official: str, name: str, dtypes: Mapping[str, torch.dtype], tables: Mapping[str, Tensor], weights: WeightSource
) -> ir.TensorProtocol:
    if official in dtypes:
        return lazy_weight(weights, official, dtypes[official], name)
    if official in tables and tables[official].device.type != "meta":
        return tensor_adapters.TorchTensor(tables[official], name=name)
    raise InputError(
        f"the graph uses {official}, which is neither in the state dict nor a table with values",
        hint='make it a buffer, created with device="cpu" in the constructor',
    )


def lazy_weight(weights: WeightSource, official: str, dtype: torch.dtype, name: str) -> ir.LazyTensor:
    """A tensor that reads a weight each time its bytes are wanted and keeps nothing."""

    def read() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(weights.read(official, dtype), name=name)

    return ir.LazyTensor(
        read, dtype=tensor_adapters.from_torch_dtype(dtype), shape=ir.Shape(weights.shapes[official]), name=name
    )
