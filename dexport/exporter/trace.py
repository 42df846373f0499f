"""From a PyTorch module to ONNX without memory for its weights.

``torch.export`` runs on fake tensors; the ONNX graph that comes out has every weight as a lazy tensor that reads from
the checkpoint when, and only when, its bytes are written. Of blocks that are equal one is traced.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dexport.collector import collector_paused
from dexport.errors import InputError
from dexport.exporter.checkpoint import WeightSource
from dexport.exporter.decompose import decompose
from dexport.exporter.module_path import GUIDANCE, path_of_producer, set_module_path
from dexport.exporter.recipes.recipe import BATCH, Signature
from dexport.exporter.repeats import Irregular, Repeats, expand, translations
from dexport.exporter.variant import Variant
from dexport.plugins.translation import translation_table

DEFAULT_OPSET = 23
logger = logging.getLogger(__name__)
TRACED_BATCH = 3
"""A size of 1 would be specialised."""


@collector_paused()
def trace(
    variant: Variant, weights: WeightSource, *, opset: int = DEFAULT_OPSET, every_block: bool = False
) -> ir.Model:
    """Trace the variant with a symbolic batch.

    Args:
        every_block: trace each block by itself, however many are equal, and leave decomposing to torch; the result is
            the same.

    Returns:
        A model whose initializers carry official parameter names and lazy values, whose nodes carry their module path
        under the key of :mod:`dexport.exporter.module_path`, and whose batch dimension is ``B``.
    """
    signature = variant.signature
    with FakeTensorMode():
        network = variant.module()
        graph_module = variant.wrap(network)
        inputs = tuple(
            torch.zeros(spec.dims(TRACED_BATCH), dtype=getattr(torch, spec.dtype)) for spec in signature.inputs
        )
    network_path = next(path for path, module in graph_module.named_modules() if module is network)
    model = None if every_block else _repeats_once(graph_module, inputs, signature, opset)
    if model is None:
        program = _export(graph_module, inputs, signature)
        if not every_block:
            decompose(program)
        model = _to_onnx(program, signature, opset)
    _rename_batch(model)
    _record_module_paths(model, network_path)
    _bind_weights(model, _official_names(graph_module, network_path), weights, variant.outline)
    return model


def _repeats_once(
    graph_module: nn.Module, inputs: tuple[Tensor, ...], signature: Signature, opset: int
) -> ir.Model | None:
    """The ONNX graph from one trace of each distinct block; None for a network where that cannot be done."""
    repeats = Repeats(graph_module)
    if not repeats:
        return None
    try:
        with repeats.opaque():
            program = _export(graph_module, inputs, signature)
        repeats.check(program)
        decompose(program)
        model = _to_onnx(program, signature, opset)
        expand(model)
    except Exception as error:
        if not _caused_by_irregularity(error):
            raise
        logger.info("every block is traced: %s", error)
        return None
    return model


def _caused_by_irregularity(error: BaseException | None) -> bool:
    """torch wraps what a module raises."""
    while error is not None and not isinstance(error, Irregular):
        error = error.__cause__ or error.__context__
    return error is not None


def _export(graph_module: nn.Module, inputs: tuple[Tensor, ...], signature: Signature) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH)
    dynamic_shapes = tuple(
        {axis: batch for axis, dim in enumerate(spec.shape) if dim == BATCH} for spec in signature.inputs
    )
    with _quiet():
        return torch.export.export(graph_module, inputs, dynamic_shapes=dynamic_shapes)


def _to_onnx(program: torch.export.ExportedProgram, signature: Signature, opset: int) -> ir.Model:
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
    return onnx_program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter announces absent torchvision operators, which no backbone here uses.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _official_names(graph_module: nn.Module, network_path: str) -> dict[str, str]:
    """Parameter and buffer names of the exported module -> names in the network's own state dict."""
    named = (*graph_module.named_parameters(), *graph_module.named_buffers())
    return {name: name.removeprefix(f"{network_path}.") for name, _ in named}


def _rename_batch(model: ir.Model) -> None:
    """Give the exporter's symbol for the batch (``s77``) its name in every shape and expression."""
    symbol = str(next(v.shape[0] for v in model.graph.inputs if v.shape is not None and len(v.shape) > 0))
    values = [*model.graph.inputs, *(out for node in model.graph.all_nodes() for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else str(d.value or "").replace(symbol, BATCH) or None for d in value.shape]
            )


def _record_module_paths(model: ir.Model, network_path: str) -> None:
    """Keep of the exporter's metadata the module path only; a node without one belongs where its input came from."""
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.metadata_props.clear()
        if scopes:
            # The last scope is the operator itself.
            path = next((scope for scope in reversed(scopes[:-1]) if scope and not scope.startswith("_")), "")
            set_module_path(node, _inside_network(path, network_path))
        else:
            set_module_path(node, path_of_producer(node))


def _inside_network(path: str, network_path: str) -> str:
    """A path in the exported module as a path in the network; what wraps the network is the guidance."""
    if not network_path or path == network_path:
        return "" if path == network_path else path
    prefix = network_path + "."
    return path.removeprefix(prefix) if path.startswith(prefix) else GUIDANCE


def _bind_weights(
    model: ir.Model, official_names: Mapping[str, str], weights: WeightSource, meta_module: nn.Module
) -> None:
    """Replace the fake values of all initializers by lazy ones, under their official names and in their order."""
    dtypes = {name: tensor.dtype for name, tensor in meta_module.state_dict().items()}
    tables = {name: buffer for name, buffer in meta_module.named_buffers() if name not in dtypes}
    order = {name: index for index, name in enumerate(official_names)}
    values = sorted(model.graph.initializers.values(), key=lambda value: order.get(str(value.name), len(order)))
    model.graph.initializers.clear()
    for value in values:
        fake = value.const_value
        if fake is not None and isinstance(getattr(fake, "raw", None), torch.Tensor):
            value.name = official_names.get(str(value.name), str(value.name))
            value.const_value = _bound(value.name, dtypes, tables, weights)
        model.graph.register_initializer(value)


def _bound(
    name: str, dtypes: Mapping[str, torch.dtype], tables: Mapping[str, Tensor], weights: WeightSource
) -> ir.TensorProtocol:
    if name in dtypes:
        return lazy_weight(weights, name, dtypes[name])
    if name in tables and tables[name].device.type != "meta":
        return tensor_adapters.TorchTensor(tables[name], name=name)
    raise InputError(
        f"the graph uses {name}, which is neither in the state dict nor a table with values",
        hint='make it a buffer, created with device="cpu" in the constructor',
    )


def lazy_weight(weights: WeightSource, name: str, dtype: torch.dtype) -> ir.LazyTensor:
    """A tensor that reads ``name`` each time its bytes are wanted and keeps nothing."""

    def read() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(weights.read(name, dtype), name=name)

    return ir.LazyTensor(
        read, dtype=tensor_adapters.from_torch_dtype(dtype), shape=ir.Shape(weights.shapes[name]), name=name
    )
