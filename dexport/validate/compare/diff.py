"""``dexport diff``: the first block that computes something wrong, the operation in it, and what would mend it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from dexport.bundle import Bundle, network_of
from dexport.exporter.gates import gates_for, gates_of
from dexport.exporter.pytorch.module_path import inside, module_path
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.variant import Variant
from dexport.exporter.weights.source import WeightSource
from dexport.validate.compare.block_errors import Arrays, BlockError, OnProgress, block_paths, relative_l2
from dexport.validate.compare.graph_diff import Difference
from dexport.validate.compare.graph_pair import (
    Comparison,
    beside_bundle,
    beside_export,
    example_inputs,
    islands_of,
    trajectory_inputs,
)
from dexport.validate.compare.localize import Mend, OpError, Outcome, Search
from dexport.validate.metrics import plain
from dexport.validate.references.recipe_network import tapped_outputs, variant_of, weights_of
from dexport.verdict import Loss, status_of

EXAMPLE, TRAJECTORY = "example", "trajectory"
EXPORT, ALTERED, PRECISION, INEXACT, GATHERED = "export", "altered", "precision", "inexact", "gathered"


@dataclass(frozen=True)
class Finding:
    """What is wrong first, in execution order.

    Attributes:
        kind: ``export``: the export departs from PyTorch. ``altered``: the file computes something else than an export.
            ``precision``: it does not, but rounding or overflow costs too much. ``inexact``: a block is too far off,
            and what it should compute in its precision is not known. ``gathered``: no block is to blame, errors add up.
        block: path of the block; for ``export`` that of a module inside it where it is known.
        op: the first bad operation inside it; None where it is not known.
        differences: what differs in that block between file and export.
    """

    kind: str
    block: str
    op: OpError | None = None
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Diff:
    """The result.

    Attributes:
        bundle: path of the bundle that was judged; ``reference``: what it was compared with.
        gate: which gate judges; ``allowed`` is its value, the largest own error of a block.
        inputs: what they were.
        blocks: in execution order.
        pytorch: block -> error of the reference's own graph against PyTorch; empty between two bundles.
        others: paths of further bad blocks.
        notes: what was not done, and why.
    """

    bundle: str
    reference: str
    gate: str
    allowed: float
    inputs: str
    blocks: tuple[BlockError, ...]
    outputs: float
    pytorch: Mapping[str, float]
    finding: Finding | None
    others: tuple[str, ...]
    mend: Mend | None
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing wrong was found; what is lost may still be more than is fit to ship."""
        return self.finding is None

    @property
    def status(self) -> str:
        """``passed``, ``lossy`` or ``failed``; see :mod:`dexport.verdict`."""
        return status_of(self.passed, self.loss)

    @property
    def loss(self) -> Loss:
        """Of the outputs, on these inputs."""
        return Loss(math.inf if math.isnan(self.outputs) else self.outputs)

    def to_json(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite becomes null."""
        document = plain(asdict(self))
        return {
            "passed": self.passed,
            "status": self.status,
            **document,
            "blocks": [block.to_json() for block in self.blocks],
        }


@fresh_torch()
def diff(
    bundle: Bundle,
    other: Bundle | None = None,
    *,
    network: str | None = None,
    graph: str = "",
    checkpoint: str | None = None,
    recipe: Recipe | None = None,
    states: str = EXAMPLE,
    seed: int = 0,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Diff:
    """Compare a bundle block by block with PyTorch, or with another bundle, which then is the one that is judged.

    Args:
        bundle: the bundle; with ``other``, the reference.
        network: by name, where there are several; by default the main one.
        graph: of the network, by name; by default the main one.
        checkpoint: where the weights are now, if not where they were.
        recipe: for a bundle that was built from a recipe of one's own.
        states: ``example`` inputs of the recipe, or those of a short ``trajectory`` with PyTorch.

    Raises:
        UsageError: bundles of different networks, no such network or graph, or weights that are gone.
        InputError: weights that are not those of the build.
    """
    own = network_of(bundle, network, graph)
    beside = None if other is None else network_of(other, network, graph)
    judged = beside or own
    variant = variant_of(judged, recipe, graph)
    gates = gates_of(judged.manifest["precision"], variant.recipe.gates)
    exact = gates_for("fp32", variant.recipe.gates).relative_l2
    on_progress(0, 1, "PyTorch")
    taps: Arrays = {}
    outputs: Arrays = {}
    opened: AbstractContextManager[Comparison]
    if other is None or states == TRAJECTORY:
        weights = weights_of(own.manifest["weights"], variant, checkpoint)
        inputs = trajectory_inputs(variant, weights, seed) if states == TRAJECTORY else example_inputs(variant, seed)
    else:  # two bundles need no checkpoint
        inputs = example_inputs(variant, seed)
    if other is None:
        taps, outputs = tapped_outputs(variant, weights, block_paths(variant.outline), inputs)
        opened = beside_export(own, variant, weights)
    else:
        assert beside is not None
        opened = beside_bundle(own, beside, variant)
    with opened as comparison:
        search = Search(comparison, inputs, gates.block_l2, exact, taps, outputs, on_progress)
        outcome = search.run(comparison.actual, comparison.expected)
        # The gate of the outputs is that of examples: along a trajectory they may be close to zero.
        limit = gates.relative_l2 if states == EXAMPLE else math.inf
        findings = _findings(comparison, outcome, limit, exact)
        first = findings[0] if findings else None
        if first is not None and first.kind == EXPORT:
            first = _inside_export(first, comparison, variant, weights, inputs, exact)
        mend = None
        if first is not None and first.kind == PRECISION:
            mend = search.mend(islands_of(judged.manifest), outcome)
    return Diff(
        bundle=str(judged.bundle.path),
        reference=comparison.name,
        gate=gates.name,
        allowed=gates.block_l2,
        inputs=f"{len(next(iter(inputs.values())))} rows of {states} inputs",
        blocks=outcome.blocks,
        outputs=outcome.outputs,
        pytorch=outcome.pytorch,
        finding=first,
        others=tuple(finding.block for finding in findings[1:]),
        mend=mend,
        notes=_notes(comparison, other),
    )


def _notes(comparison: Comparison, other: Bundle | None) -> tuple[str, ...]:
    notes = []
    if comparison.expected is None:
        notes.append("what the precision explains of an own error: no reference in the same precision can be made")
    if other is not None:
        notes.append("PyTorch: two bundles were compared")
    return tuple(notes)


def _findings(comparison: Comparison, outcome: Outcome, allowed: float, allowed_export: float) -> list[Finding]:
    """What is wrong, in execution order."""
    found = []
    for error in outcome.blocks:
        path = error.path
        differing = [d for d in comparison.differences if comparison.layout.block_of(d.module) == path]
        operations = outcome.operations.get(path, ())
        if not outcome.exact and outcome.pytorch.get(path, 0.0) > allowed_export:
            found.append(Finding(EXPORT, path))
        elif error.altered:
            op = operations[0] if operations else None
            found.append(Finding(ALTERED, path, op, _relevant(differing or error.differences, op)))
        elif error.imprecise:
            kind = PRECISION if comparison.convert else INEXACT
            found.append(Finding(kind, path, operations[0], tuple(differing)))
    if not found and not outcome.exact:
        found.append(Finding(EXPORT, outcome.blocks[-1].path))
    if not found and (math.isnan(outcome.outputs) or outcome.outputs > allowed):
        found.append(Finding(GATHERED, max(outcome.blocks, key=lambda error: error.own).path))
    return found


def _relevant(differing: Sequence[Difference], op: OpError | None) -> tuple[Difference, ...]:
    """Differences of the block, those of the operation first."""
    return tuple(sorted(differing, key=lambda d: (op is None or d.node != op.node, not d.decisive)))


def _inside_export(
    finding: Finding,
    comparison: Comparison,
    variant: Variant,
    weights: WeightSource,
    inputs: Arrays,
    allowed: float,
) -> Finding:
    """The first module inside the block whose output the export does not have; the block where none stands out."""
    modules = [path for path, _ in variant.outline.named_modules() if path and inside(path, finding.block)]
    taps, _ = tapped_outputs(variant, weights, modules, inputs)
    layout, nodes = comparison.layout, comparison.reference.model.graph
    module_of = {
        name: module_path(node)
        for node in nodes
        if inside(module_path(node), finding.block)
        for name in layout.shared[str(node.name)]
    }
    values = comparison.reference.part(list(module_of), ()).run(inputs)
    for path, tap in taps.items():
        candidates = [
            values[name]
            for name, module in module_of.items()
            if inside(module, path) and values[name].shape == tap.shape
        ]
        if candidates and min(relative_l2(tap, value) for value in candidates) > allowed:
            return Finding(EXPORT, path)
    return finding
