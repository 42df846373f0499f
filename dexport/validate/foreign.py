"""``dexport validate model.onnx``: an ONNX file that something else made, against the PyTorch network of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dexport.errors import UsageError
from dexport.exporter.checkpoint import open_weights
from dexport.exporter.recipes.recipe import DEFAULT_GATES, Recipe
from dexport.exporter.variant import Variant, resolve
from dexport.runtime.session import OnnxSession
from dexport.validate.metrics import compare
from dexport.validate.parity import (
    MAX_DISTINCT_ROWS,
    Check,
    ParityReport,
    batch_sizes,
    reference_outputs,
    row_order,
    take_rows,
)
from dexport.validate.ports import as_taken, match_ports

MAX_BATCH = 4
HALVES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
NOT_RUN = "the trajectory: it runs on bundles only"


def validate_foreign(
    model: Path,
    recipe: Recipe,
    checkpoint: str | None,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> ParityReport:
    """Compare single evaluations; inputs and outputs are matched by name, or else by their order.

    The gate is the recipe's for float32, or for half precision where the file stores its weights so.

    Args:
        model: the ONNX file; a fixed batch and size are kept.
        recipe: what it is meant to compute.
        checkpoint: the weights it was made from.
        seed: of the inputs.

    Raises:
        InputError: not a model, or one with other inputs and outputs than the recipe has.
    """
    if not model.is_file():
        raise UsageError(f"{model} does not exist", hint="name an ONNX file, or a bundle's folder")
    session = OnnxSession(model)
    variant = variant_for(recipe, session)
    weights = open_weights(checkpoint, variant.outline, seed=seed, adapt=recipe.adapt)
    names = match_ports(str(model), session, "the recipe", variant.signature.inputs, variant.signature.outputs)
    fixed = next(iter(session.inputs.values())).shape[0]
    batches = [fixed] if isinstance(fixed, int) else batch_sizes(MAX_BATCH)
    rows = min(MAX_DISTINCT_ROWS, max(batches))
    precision = _precision(model)
    gate = {**DEFAULT_GATES, **recipe.gates}[precision]
    inputs = variant.signature.example(rows, seed)
    on_progress(0, len(batches) + 1, "PyTorch float32")
    expected = reference_outputs(variant, weights, inputs, rows)
    checks = []
    for done, batch in enumerate(batches, start=1):
        on_progress(done, len(batches) + 1, f"batch {batch}")
        order = row_order(batch, rows)
        taken = take_rows(variant.signature, inputs, order)
        results = session(**as_taken(taken, names, session))
        for name, reference in expected.items():
            metrics = compare(reference[order], results[names[name]].astype(np.float32))
            checks.append(Check("as given", session.runner, batch, name, metrics, gate))
    reference_name = f"PyTorch {recipe.name}, float32 on CPU, {weights.origin}"
    times = tuple(float(t) for t in inputs.get("t", ()))
    return ParityReport(precision, reference_name, times, tuple(checks), (NOT_RUN,))


def variant_for(recipe: Recipe, session: OnnxSession) -> Variant:
    """The recipe at the size that the file has, fused where the file takes a scale."""
    shapes = [port.shape for port in session.inputs.values() if len(port.shape) == 4]
    sides = tuple(shapes[0][2:]) if shapes else ()
    latent = sides if len(sides) == 2 and all(isinstance(side, int) for side in sides) else None
    return resolve(recipe, latent=latent, fused=any(not port.shape for port in session.inputs.values()))


def _precision(model: Path) -> str:
    found = {value.dtype for value in ir.load(model).graph.initializers.values()}
    return next((name for dtype, name in HALVES.items() if dtype in found), "fp32")
