"""The ONNX files of a network and their weights: trace, passes, precision, streamed save, checks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from dexport.bundle import MODEL_DATA, graph_file
from dexport.contract import TIME
from dexport.errors import DexportError, InputError, UsageError
from dexport.exporter import passes
from dexport.exporter.custom_ops import CustomOp, custom_ops
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.fold_time import TABLE, FoldTime
from dexport.exporter.passes.precision import ToLowPrecision, precision_map
from dexport.exporter.pytorch.module_path import inside, module_path
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.pytorch.threads import torch_threads
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.schemes import quantised_layers
from dexport.exporter.quantize.ternary import StoreTernary, TernaryStorage
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.shared_weights import SharedWeights
from dexport.exporter.steps import StepLog
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import Variant
from dexport.exporter.weights.source import WeightSource
from dexport.files import writing_to
from dexport.version import __version__

WORKERS = 2
IN_FLIGHT = 32 << 20


@dataclass(frozen=True)
class Exported:
    """What the export of a graph leaves behind besides the file.

    Attributes:
        ops_traced, ops: operator histograms before and after the passes.
        precisions: node name -> float type it computes in.
        custom_ops: ops that the graph keeps as nodes with a function body.
        onnx_bytes: size of the file, without its weights.
        quantised: module path -> what was done to its layer.
        time_tables: where time is folded, :func:`fold_time`'s figures.
    """

    ops_traced: dict[str, int]
    ops: dict[str, int]
    precisions: dict[str, str]
    custom_ops: tuple[CustomOp, ...]
    onnx_bytes: int
    quantised: dict[str, str] = field(default_factory=dict)
    time_tables: dict[str, int] | None = None


@fresh_torch()
def export_onnx(
    variant: Variant,
    weights: WeightSource,
    folder: Path,
    *,
    precision: str,
    islands: Islands,
    opset: int,
    log: StepLog,
    plugin_target: str | None = None,
    ternary: TernaryStorage | None = None,
    plan: Plan | None = None,
    without: Collection[str] = (),
) -> dict[str, Exported]:
    """Write every graph of a network, and ``model.onnx.data`` for all beside them.

    Args:
        folder: of the files.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        plan: what to quantise, after the conversion to ``precision``.
        plugin_target: GPU whose plugin kernels are to be recorded, when the engine will embed them.
        ternary: how ternary layers are stored; dense without.
        without: passes to leave out.

    Returns:
        By graph.

    Raises:
        InputError: weights that are not finite, or too large for the precision.
        MachineError: the disk is full or cannot be written.
    """
    exported: dict[str, Exported] = {}
    modules: set[str] = set()
    shared: SharedWeights | None = None
    for each in variant.each:
        path = folder / graph_file(each.graph)
        with log.step("trace"):
            model = trace(each, weights, opset=opset)
            traced = passes.op_histogram(model)
            modules |= {module_path(node) for node in model.graph}
        if each.graph == variant.graphs[-1]:
            check_islands(islands, modules)
        with log.step("passes"), _own_errors():
            model, time_tables = convert(
                model,
                each,
                precision=precision,
                islands=islands,
                ternary=ternary,
                without=without,
                quantised=None if plan is None else quantised_layers(plan.schemes),
            )
            quantised = {} if plan is None else plan.apply(model, partial=len(variant.graphs) > 1)
            ops = custom_ops(model, plugin_target)
            AttachFunctions()(model)
            _describe(model, each)
        with log.step("save"), _own_errors():
            if shared is None:
                save(model, path, on_tensor=lambda done, total, name: log.listener.advance(done, total, name))
            else:
                with writing_to(folder), torch_threads(1):
                    shared.save(model, path)
        if shared is None and len(variant.graphs) > 1:
            shared = SharedWeights(path, folder / MODEL_DATA)
        with log.step("check"):
            check(path)
        exported[each.graph] = Exported(
            traced,
            passes.op_histogram(model),
            precision_map(model),
            ops,
            path.stat().st_size,
            quantised,
            time_tables,
        )
    return exported


def convert(
    model: ir.Model,
    variant: Variant,
    *,
    precision: str,
    islands: Islands,
    ternary: TernaryStorage | None,
    without: Collection[str] = (),
    quantised: Collection[str] | None = None,
) -> tuple[ir.Model, dict[str, int] | None]:
    """A traced graph in the build's precision, before anything is quantised; and what :func:`fold_time` returns.

    Args:
        without: passes to leave out.
        quantised: paths of the layers that will be; None where nothing is.
    """
    if ternary is not None:
        StoreTernary(ternary)(model)
    model = passes.clean(without)(model).model
    if quantised is not None:
        model = passes.arrange_for_integers(without)(model).model
    folded = fold_time(model, variant, quantised or ())
    return model if precision == "fp32" else ToLowPrecision(precision, islands)(model).model, folded


def fold_time(model: ir.Model, variant: Variant, keep: Collection[str] = ()) -> dict[str, int] | None:
    """Fold what depends on time alone, where the variant has a table of times.

    Returns:
        How many ``tables`` there are, their ``bytes``, and how many ``nodes`` and bytes of weights (``weight_bytes``)
        they replace, all in float32.
    """
    if variant.table is None:
        return None
    spec = variant.signature.input(TIME)
    if spec is None:
        return None
    nodes, weights = len(model.graph), _sizes(model)
    FoldTime(spec.name, np.unique(np.array(variant.table.times, np.float32)), keep)(model)
    left = _sizes(model)
    tables = [size for name, size in left.items() if name.endswith(TABLE)]
    return {
        "tables": len(tables),
        "bytes": sum(tables),
        "nodes": nodes - len(model.graph),
        "weight_bytes": sum(size for name, size in weights.items() if name not in left),
    }


def _sizes(model: ir.Model) -> dict[str, int]:
    weights = model.graph.initializers.items()
    return {name: value.const_value.nbytes for name, value in weights if value.const_value is not None}


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the error of ours that onnx-ir wrapped in one of its own, when reading a weight failed."""
    try:
        yield
    except (ir.passes.PassError, ir.serde.SerdeError) as wrapper:
        cause: BaseException | None = wrapper
        while cause is not None and not isinstance(cause, DexportError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def save(model: ir.Model, path: Path, on_tensor: Callable[[int, int, str], None] | None = None) -> None:
    """Save with all weights in one external file: one is read and converted while another is written.

    At most one larger than ``IN_FLIGHT`` bytes is in memory.
    """
    done = itertools.count(1)

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if on_tensor is not None:
            on_tensor(next(done), info.total, tensor.name or "")

    # Converting is limited by memory: threads inside an operator mostly spin until the others are done.
    with writing_to(path.parent), torch_threads(1):
        ir.save(
            model,
            path,
            external_data=MODEL_DATA,
            callback=report,
            max_workers=WORKERS,
            max_in_flight_bytes=IN_FLIGHT,
        )


def check(path: Path) -> None:
    """The full ONNX checker and strict shape inference, on the file.

    Raises:
        InputError: the graph is not valid ONNX; a recipe's graph has a defect.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True, check_type=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"the exported graph is not valid: {error}", hint="this is a defect of the recipe") from error


def check_islands(islands: Islands, modules: Collection[str]) -> None:
    """Refuse islands that match no module of any graph.

    Raises:
        UsageError: so they are.
    """
    for pattern in islands.modules:
        if not any(inside(path, pattern) for path in modules):
            raise UsageError(
                f"the island {pattern!r} matches no module",
                hint=f"modules are called like {', '.join(sorted(filter(None, modules))[:4])}",
            )


def _describe(model: ir.Model, variant: Variant) -> None:
    model.producer_name = "dexport"
    model.producer_version = __version__
    model.graph.name = variant.recipe.name
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.update(
        {
            "dexport.recipe": variant.recipe.name,
            "dexport.family": variant.recipe.family,
            "dexport.config": variant.config_json(),
            "dexport.graph": variant.graph,
        }
    )
