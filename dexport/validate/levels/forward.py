"""Forward parity: float32 PyTorch against the exported graph, over timesteps and batch sizes.

A low-precision graph is run twice. As shipped, ONNX Runtime on a CPU computes it in float32 without rounding between
nodes, which shows that the file is right but not what half precision costs; bfloat16 it cannot run at all. So the same
graph runs again with every rounding made explicit (:mod:`dexport.exporter.passes.emulate_low_precision`), which is what
the gate of a half-precision build mainly judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dexport.errors import InputError
from dexport.exporter.passes.emulate_low_precision import EmulateLowPrecision
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.recipe import BATCH, DEFAULT_GATES, Signature
from dexport.exporter.torch_session import TorchSession, torch_runner
from dexport.exporter.variant import Variant
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.int8_products import caveat
from dexport.runtime.session import OnnxSession
from dexport.validate.levels.choices import Choices
from dexport.validate.metrics import Metrics, compare
from dexport.validate.read_graph import read_graph
from dexport.validate.references.recipe_network import torch_session
from dexport.verdict import PASSED, Loss, status_of

MAX_DISTINCT_ROWS = 4
"""Rows of input that differ; larger batches repeat them. More rows would cost more reference passes, not show more."""
REFERENCE_BATCH = 2
"""Rows per PyTorch pass, to bound memory."""

Arrays = Mapping[str, np.ndarray]
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        kind: ``as shipped`` or ``rounded`` (explicit rounding), or ``batch consistency``.
        runner: what computed it.
        batch: batch size of the run.
        output: name of the output.
        metrics: against PyTorch; for batch consistency, against the same row in another slot or batch.
        gate: largest ``relative_l2`` allowed.
    """

    kind: str
    runner: str
    batch: int
    output: str
    metrics: Metrics
    gate: float

    @property
    def passed(self) -> bool:
        """Whether it is within its gate."""
        return self.metrics.finite and self.metrics.relative_l2 <= self.gate

    @property
    def status(self) -> str:
        """``passed``, ``lossy`` (within its gate, and more than is fit to ship) or ``failed``."""
        return status_of(self.passed, Loss(self.metrics.relative_l2))


@dataclass(frozen=True)
class ParityReport:
    """All checks, what was not run and why, and what a reader has to know (``notes``)."""

    precision: str
    reference: str
    timesteps: tuple[float, ...]
    checks: tuple[Check, ...]
    not_run: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> Loss:
        """The worst relative L2 of all checks."""
        errors = [check.metrics.relative_l2 for check in self.checks]
        return Loss(max((math.inf if math.isnan(error) else error for error in errors), default=None))

    @property
    def status(self) -> str:
        """``passed``, ``lossy`` or ``failed``; see :mod:`dexport.verdict`."""
        return status_of(bool(self.checks) and all(check.passed for check in self.checks), self.loss)

    @property
    def passed(self) -> bool:
        """Whether it is within its gates, and what is lost is fit to ship."""
        return self.status == PASSED

    def to_json(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite becomes null."""
        document = asdict(self)
        document["checks"] = [
            {
                **asdict(check),
                "metrics": finite_or_null(asdict(check.metrics)),
                "passed": check.passed,
                "status": check.status,
            }
            for check in self.checks
        ]
        return {"passed": self.passed, "status": self.status, "loss": self.loss.to_json(), **document}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ParityReport:
        """The inverse of :meth:`to_json` for a report that did not fail, whose only infinite figures are SNRs."""
        checks = []
        for values in document["checks"]:
            figures: dict[str, Any] = {n: math.inf if v is None else v for n, v in values["metrics"].items()}
            kept = {name: value for name, value in values.items() if name not in ("metrics", "passed", "status")}
            checks.append(Check(metrics=Metrics(**figures), **kept))
        return cls(
            document["precision"],
            document["reference"],
            tuple(document["timesteps"]),
            tuple(checks),
            tuple(document["not_run"]),
            tuple(document["notes"]),
        )

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps: the worst figure of each kind."""
        worst: dict[str, float] = {}
        for check in self.checks:
            worst[check.kind] = max(worst.get(check.kind, 0.0), check.metrics.relative_l2)
        return {
            "passed": self.passed,
            "status": self.status,
            "worst_relative_l2": finite_or_null(worst),
            "not_run": list(self.not_run),
        }


def finite_or_null(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity and no NaN."""
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


@fresh_torch()
def check_parity(
    variant: Variant,
    weights: WeightSource,
    model_path: Path,
    *,
    precision: str,
    max_batch: int,
    gate: str = "",
    limit: float | None = None,
    session: TorchSession | None = None,
    on_progress: OnProgress | None = None,
    seed: int = 0,
) -> ParityReport:
    """Compare an exported graph with its PyTorch reference.

    Args:
        weights: where the reference takes its weights, in float32.
        model_path: the exported file.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        max_batch: largest batch of the profile.
        gate: which of the recipe's gates judges: ``int8``, ``w8a8``, or the precision's where it is empty.
        limit: largest relative L2, in place of that gate.
        session: a reference in place of the recipe's network.
    """
    tell = on_progress or _ignore
    batches = batch_sizes(max_batch)
    rows = min(MAX_DISTINCT_ROWS, max_batch)
    inputs = variant.signature.example(rows, seed)
    times = [spec.name for spec in variant.signature.inputs if spec.values == "stratified"]
    runs = _plan(precision, batches)
    total = len(runs) + 1

    tell(0, total, "PyTorch float32")
    expected = reference_outputs(variant, weights, inputs, rows, session)
    choices = Choices(expected, {} if session else scores_of(variant, weights, inputs, rows))
    gate = gate or precision
    limit = {**DEFAULT_GATES, **variant.recipe.gates}[gate] if limit is None else limit
    checks: list[Check] = []
    graph: OnnxSession | None = None
    opened = ""
    seen: dict[tuple[str, int], np.ndarray] = {}
    for done, (kind, batch) in enumerate(runs, start=1):
        tell(done, total, f"{kind}, batch {batch}")
        if kind != opened:
            graph = None  # free the previous one before the next is loaded
            graph = open_graph(kind, model_path)
            opened = kind
        assert graph is not None
        order = row_order(batch, rows)
        got = graph(**take_rows(variant.signature, inputs, order))
        for name, array in got.items():
            wanted, found = choices.worth(kind, name, array, order)
            checks.append(Check(kind, graph.runner, batch, name, compare(wanted, found), limit))
            checks += _consistency(graph.runner, kind, batch, name, order, found, seen, limit)
    tell(total, total, "")
    return ParityReport(
        precision=precision if gate == precision else f"{precision}, {gate}",
        reference=session.runner if session else torch_runner(),
        timesteps=tuple(float(time) for name in times for time in inputs[name]),
        checks=tuple(checks),
        not_run=_not_run(precision),
        notes=(*choices.notes, *int8_notes(model_path)),
    )


def _ignore(done: int, total: int, detail: str) -> None:
    """Progress that nobody wants to see."""


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, one in between and the profile's maximum."""
    return sorted({1, min(2, max_batch), (2 + max_batch) // 2 if max_batch > 2 else 1, max_batch})


def row_order(batch: int, rows: int) -> list[int]:
    """Which distinct row is in which slot: rotated by the batch, so that rows change slots and neighbours."""
    return [(slot + batch) % rows for slot in range(batch)]


def take_rows(signature: Signature, inputs: Arrays, order: Sequence[int]) -> dict[str, np.ndarray]:
    """Select rows of every input that has a batch dimension."""
    return {
        spec.name: inputs[spec.name][list(order)] if BATCH in spec.shape else inputs[spec.name]
        for spec in signature.inputs
    }


def reference_outputs(
    variant: Variant, weights: WeightSource, inputs: Arrays, rows: int, session: TorchSession | None = None
) -> dict[str, np.ndarray]:
    """Outputs of the float32 PyTorch module, or of a ``session`` in its place, row by row in small batches.

    Raises:
        InputError: they are NaN, so that nothing can be compared with them.
    """
    session = session or torch_session(variant, weights)
    parts = [
        session(**take_rows(variant.signature, inputs, range(start, min(start + REFERENCE_BATCH, rows))))
        for start in range(0, rows, REFERENCE_BATCH)
    ]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, array in outputs.items():
        if np.isnan(array).any():
            raise InputError(
                f"{variant.recipe.name}: {name} is NaN in PyTorch's float32",
                hint="check the checkpoint, and rows of attention that are masked as a whole",
            )
    return outputs


def scores_of(variant: Variant, weights: WeightSource, inputs: Arrays, rows: int) -> dict[str, np.ndarray]:
    """PyTorch's scores of all that its integer outputs might have been, by output; see ``TensorSpec.scores``."""
    found = {}
    for spec in variant.signature.outputs:
        if spec.scores:
            (found[spec.name],) = reference_outputs(replace(variant, graph=spec.scores), weights, inputs, rows).values()
    return found


def _plan(precision: str, batches: Sequence[int]) -> list[tuple[str, int]]:
    """(kind, batch) of every run, grouped by kind."""
    runs = [] if precision == "bf16" else [("as shipped", batch) for batch in batches]
    if precision != "fp32":
        rounded = batches if precision == "bf16" else batches[:2]
        runs += [("rounded", batch) for batch in rounded]
    return runs


def _not_run(precision: str) -> tuple[str, ...]:
    if precision == "bf16":
        return ("as shipped: ONNX Runtime has no bfloat16 kernels on a CPU",)
    return ()


def int8_notes(model_path: Path) -> tuple[str, ...]:
    """What this CPU does to the figures of a file that computes in int8; empty for any other file or CPU."""
    said = caveat()
    if said is None or not any(node.op_type == "QuantizeLinear" for node in read_graph(model_path).graph.all_nodes()):
        return ()
    return (said,)


def open_graph(kind: str, model_path: Path) -> OnnxSession:
    """The exported file ``as shipped``, or ``rounded``: with the rounding of every activation made explicit."""
    if kind == "as shipped":
        return OnnxSession(model_path)
    model = read_graph(model_path)
    EmulateLowPrecision()(model)
    session = OnnxSession(ir.to_proto(model).SerializeToString(), data_folder=model_path.parent)
    session.runner += ", every rounding explicit"
    return session


def _consistency(
    runner: str,
    kind: str,
    batch: int,
    output: str,
    order: Sequence[int],
    array: np.ndarray,
    seen: dict[tuple[str, int], np.ndarray],
    gate: float,
) -> list[Check]:
    """Every occurrence of a row against its first one, whatever its slot, batch and neighbours were."""
    first, again = [], []
    for slot, row in enumerate(order):
        key = (f"{kind}/{output}", row)
        if key in seen:
            first.append(seen[key])
            again.append(array[slot])
        else:
            seen[key] = array[slot]
    if not again:
        return []
    metrics = compare(np.stack(first), np.stack(again))
    return [Check("batch consistency", f"{runner}, {kind}", batch, output, metrics, gate)]
