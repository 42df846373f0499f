"""One ONNX file from a variant and its weights: trace, passes, precision, streamed save, checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from dexport.bundle import MODEL_DATA, writing_to
from dexport.errors import DexportError, InputError, UsageError
from dexport.exporter import passes
from dexport.exporter.checkpoint import WeightSource
from dexport.exporter.custom_ops import CustomOp, custom_ops
from dexport.exporter.module_path import inside, module_path
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.precision import ToLowPrecision, precision_map
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.ternary import StoreTernary, TernaryStorage
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.steps import StepLog
from dexport.exporter.trace import trace
from dexport.exporter.variant import Variant
from dexport.version import __version__


@dataclass(frozen=True)
class Exported:
    """What an export leaves behind besides the file.

    Attributes:
        ops_traced, ops: operator histograms before and after the passes.
        precisions: node name -> float type it computes in.
        custom_ops: ops that the graph keeps as nodes with a function body.
        onnx_bytes: size of the file with its weights.
        quantised: module path -> what was done to its layer.
    """

    ops_traced: dict[str, int]
    ops: dict[str, int]
    precisions: dict[str, str]
    custom_ops: tuple[CustomOp, ...]
    onnx_bytes: int
    quantised: dict[str, str] = field(default_factory=dict)


def export_onnx(
    variant: Variant,
    weights: WeightSource,
    path: Path,
    *,
    precision: str,
    islands: Islands,
    opset: int,
    log: StepLog,
    plugin_target: str | None = None,
    ternary: TernaryStorage | None = None,
    plan: Plan | None = None,
    without: Collection[str] = (),
) -> Exported:
    """Write ``path`` and ``model.onnx.data`` beside it.

    Args:
        precision: ``fp32``, ``fp16`` or ``bf16``.
        plan: what to quantise, after the conversion to ``precision``.
        plugin_target: GPU whose plugin kernels are to be recorded, when the engine will embed them.
        ternary: how ternary layers are stored; dense without.
        without: passes to leave out.

    Raises:
        InputError: weights that are not finite, or too large for the precision.
        MachineError: the disk is full or cannot be written.
    """
    with log.step("trace"):
        model = trace(variant, weights, opset=opset)
        traced = passes.op_histogram(model)
    with log.step("passes"), _own_errors():
        model = convert(model, precision, islands, ternary, without=without, quantised=plan is not None)
        quantised = {} if plan is None else plan.apply(model)
        ops = custom_ops(model, plugin_target)
        AttachFunctions()(model)
        _describe(model, variant)
    with log.step("save"), _own_errors():
        save(model, path, on_tensor=lambda done, total, name: log.listener.advance(done, total, name))
    with log.step("check"):
        check(path)
    return Exported(
        traced,
        passes.op_histogram(model),
        precision_map(model),
        ops,
        sum(path.with_name(file).stat().st_size for file in (path.name, MODEL_DATA)),
        quantised,
    )


def convert(
    model: ir.Model,
    precision: str,
    islands: Islands,
    ternary: TernaryStorage | None,
    *,
    without: Collection[str] = (),
    quantised: bool = False,
) -> ir.Model:
    """A traced graph in the build's precision, before anything is quantised.

    Args:
        without: passes to leave out.
        quantised: whether its layers will be.
    """
    if ternary is not None:
        StoreTernary(ternary)(model)
    model = passes.clean(without)(model).model
    if quantised:
        model = passes.arrange_for_integers(without)(model).model
    _check_modules(model, "island", islands.modules)
    return model if precision == "fp32" else ToLowPrecision(precision, islands)(model).model


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
    """Save with all weights in one external file, one of them in memory at a time."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if on_tensor is not None:
            on_tensor(info.index + 1, info.total, tensor.name or "")

    with writing_to(path.parent):
        ir.save(
            model,
            path,
            external_data=MODEL_DATA,
            callback=report,
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


def _check_modules(model: ir.Model, kind: str, patterns: tuple[str, ...]) -> None:
    paths = {module_path(node) for node in model.graph}
    for pattern in patterns:
        if not any(inside(path, pattern) for path in paths):
            raise UsageError(
                f"the {kind} {pattern!r} matches no module",
                hint=f"modules are called like {', '.join(sorted(filter(None, paths))[:4])}",
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
            "dexport.guidance": variant.guidance_rule,
        }
    )
