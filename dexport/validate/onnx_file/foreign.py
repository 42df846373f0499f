"""``dexport compare model.onnx``: an ONNX file that something else made, against the PyTorch network of a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dexport.errors import InputError, UsageError
from dexport.exporter.gates import gates_for
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.diffusion import graphs_of
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from dexport.runtime.inputs import NamedPort, port_of
from dexport.runtime.session import LONGEST, OnnxSession
from dexport.validate.levels.choices import Choices
from dexport.validate.levels.forward import (
    MAX_DISTINCT_ROWS,
    Check,
    ParityReport,
    batch_sizes,
    reference_outputs,
    row_order,
    scores_of,
    take_rows,
)
from dexport.validate.metrics import compare
from dexport.validate.onnx_file.match_ports import as_seen, as_taken, match_ports
from dexport.validate.read_graph import read_graph

MAX_BATCH = 4
HALVES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
HALF = "tensor(float16)"
NOT_RUN = "the trajectory: it runs on bundles only"


@fresh_torch()
def validate_foreign(
    model: Path,
    recipe: Recipe,
    checkpoint: str | None,
    *,
    ports: Mapping[str, str] | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> ParityReport:
    """Compare single evaluations; :mod:`~dexport.validate.onnx_file.match_ports` says which input is which.

    The gate is the recipe's for float32, or for half precision where the file stores its weights, inputs or outputs so.
    Where inputs are rounded to the file's types, PyTorch gets them rounded too.

    Args:
        model: the ONNX file; a fixed batch and size are kept.
        recipe: what it is meant to compute.
        checkpoint: the weights it was made from.
        ports: the recipe's names of inputs and outputs -> the file's, where they differ.
        seed: of the inputs.

    Raises:
        InputError: not a model, one with other inputs and outputs than the recipe has, or one that ONNX Runtime
            cannot run.
    """
    if not model.is_file():
        raise UsageError(f"{model} does not exist", hint="name an ONNX file")
    session = OnnxSession(model)
    variant = variant_for(recipe, session)
    weights = open_weights(checkpoint, variant.outline, seed=seed, adapt=recipe.adapt)
    wanted = ports_of(variant)
    matched = match_ports(str(model), session, "the recipe", *wanted, ports)
    names = matched.names
    batches = batch_sizes(MAX_BATCH) if matched.batch is None else [matched.batch]
    rows = min(MAX_DISTINCT_ROWS, max(batches))
    precision = _precision(model, session)
    gate = gates_for(precision, recipe.gates).relative_l2
    inputs = as_seen(variant.signature.example(rows, seed), names, session)
    on_progress(0, len(batches) + 1, "PyTorch float32")
    expected = reference_outputs(variant, weights, inputs, rows)
    choices = Choices(expected, scores_of(variant, weights, inputs, rows))
    checks = []
    for done, batch in enumerate(batches, start=1):
        on_progress(done, len(batches) + 1, f"batch {batch}")
        order = row_order(batch, rows)
        taken = take_rows(variant.signature, inputs, order)
        results = _run(model, session, as_taken(taken, names, session), batch)
        for name, reference in expected.items():
            result, right = results[names[name]], reference[order]
            if result.shape != right.shape:
                raise InputError(
                    f"{model}: {names[name]} has shape {list(result.shape)} at batch {batch}, expected "
                    f"{list(right.shape)}",
                    hint="it is not the network of this recipe, or not at this size",
                )
            metrics = compare(*choices.worth("as given", name, result, order))
            checks.append(Check("as given", session.runner, batch, name, metrics, gate))
    reference_name = f"PyTorch {recipe.name}, float32 on CPU, {weights.origin}"
    times = tuple(float(t) for t in inputs.get("t", ()))
    return ParityReport(precision, reference_name, times, tuple(checks), (NOT_RUN,), (*choices.notes, *matched.notes))


def _run(model: Path, session: OnnxSession, inputs: Mapping[str, np.ndarray], batch: int) -> Mapping[str, np.ndarray]:
    """Inputs were checked before: what ONNX Runtime refuses now, the file promised to take."""
    try:
        return session(**inputs)
    except UsageError as error:
        raise InputError(
            f"{model} fails at batch {batch}, which its inputs allow: {' '.join(str(error).split())[:LONGEST]}",
            hint="export it again, with this batch or with a free one",
        ) from error


def ports_of(variant: Variant) -> tuple[list[NamedPort], list[NamedPort]]:
    """The inputs and the outputs of a network, as a session would describe them."""
    signature = variant.signature
    return [port_of(s.port) for s in signature.inputs], [port_of(s.port) for s in signature.outputs]


def variant_for(recipe: Recipe, session: OnnxSession) -> Variant:
    """The recipe at the size that the file has; its graph is the one that has as many inputs."""
    shapes = [port.shape for port in session.inputs.values() if len(port.shape or ()) == 4]
    sides = tuple(shapes[0][2:]) if shapes else ()
    latent = sides if len(sides) == 2 and all(isinstance(side, int) for side in sides) else None
    variant = resolve(recipe, latent=latent)
    for name in graphs_of(recipe):
        with contextlib.suppress(UsageError):
            other = resolve(recipe, latent=latent, graphs=[name])
            if len(other.signature.inputs) == len(session.inputs) != len(variant.signature.inputs):
                return other
    return variant


def _precision(model: Path, session: OnnxSession) -> str:
    try:
        found = {value.dtype for value in read_graph(model).graph.initializers.values()}
    except Exception as error:  # a damaged file can break a reader anywhere
        raise InputError(
            f"{model} cannot be read: {' '.join(str(error).split())[:LONGEST]}", hint="export it again"
        ) from error
    half = any(port.type == HALF for port in (*session.inputs.values(), *session.output_ports.values()))
    return next((name for dtype, name in HALVES.items() if dtype in found), "fp16" if half else "fp32")
