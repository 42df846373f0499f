"""A bundle beside its reference: the graphs to compare, their inputs, and how much may differ."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dexport.bundle import Network, graph_file
from dexport.errors import UsageError
from dexport.exporter import passes
from dexport.exporter.export import export_onnx
from dexport.exporter.passes.precision import ToLowPrecision
from dexport.exporter.quantize.calibrate import FEWEST_IMAGES, STEPS, Calibration, sample_batches
from dexport.exporter.quantize.ternary import choose_storage
from dexport.exporter.recipes.recipe import BATCH, Islands
from dexport.exporter.steps import StepLog
from dexport.exporter.trajectory import RecordingNetwork
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource
from dexport.validate.compare.block_errors import (
    BlockError,
    Deviation,
    Layout,
    OnProgress,
    block_paths,
    by_block,
    lay_out,
    sweep,
)
from dexport.validate.compare.graph_diff import Difference, differences
from dexport.validate.compare.subgraph import CutGraph
from dexport.validate.read_graph import read_graph

ROWS = 4
"""Rows of example input of a denoiser: times over the whole schedule."""
IMAGE_ROWS = 2
"""Rows of anything else, such as a decoder, whose activations are large."""
FLOAT32 = "fp32"
NO_ISLANDS = Islands()
QUANTISED = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits", "DexTernaryMatMul"}
)


@dataclass(frozen=True)
class Comparison:
    """What a sweep needs, and what of it differs before anything is run.

    Attributes:
        name: what the bundle is compared with, for people.
        actual: the bundle's graph.
        expected: what an export writes in the bundle's precision: ``actual`` itself where nothing differs, None where
            it is not known.
        differences: between the two.
        convert: gives ``expected`` with other islands; None where that cannot be had.
        paths: of the network's blocks.
    """

    name: str
    reference: CutGraph
    actual: CutGraph
    expected: CutGraph | None
    differences: tuple[Difference, ...]
    layout: Layout
    convert: Callable[[Islands], CutGraph] | None
    paths: tuple[str, ...]

    @property
    def decisive(self) -> tuple[Difference, ...]:
        """The differences that are faults whatever they do."""
        return tuple(difference for difference in self.differences if difference.decisive)


@contextlib.contextmanager
def beside_export(bundle: Network, variant: Variant, weights: WeightSource) -> Iterator[Comparison]:
    """A bundle beside a float32 export of the recipe and checkpoint that it was built from, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="dexport-diff-") as folder:
        path = Path(folder) / graph_file(variant.graph)
        ternary = bundle.manifest["ternary"]
        export_onnx(
            replace(variant, graphs=(variant.graph,)),
            weights,
            path.parent,
            precision=FLOAT32,
            islands=NO_ISLANDS,
            opset=bundle.manifest["opset"],
            ternary=choose_storage(variant, True, ternary["carrier"], None, plugins=False) if ternary else None,
            without=bundle.manifest.get("no_passes", ()),
            log=StepLog(),
        )
        yield _compare(f"a float32 export of {variant.recipe.name}", path, bundle, variant)


@contextlib.contextmanager
def beside_bundle(reference: Network, bundle: Network, variant: Variant) -> Iterator[Comparison]:
    """Two bundles of one recipe and configuration.

    Raises:
        UsageError: they are of different networks, times or graph passes, or the reference is the less precise one.
    """
    keys = ("recipe", "config", "latent")
    for key in keys:
        ours, theirs = (other.manifest[key] for other in (bundle, reference))
        if ours != theirs:
            raise UsageError(
                f"{bundle.path} and {reference.path} are of different networks: {key} is {_short(ours, theirs)}",
                hint="compare bundles of one recipe and configuration",
            )
    if variant.graph not in reference.graphs:
        raise UsageError(
            f"{reference.path} has no graph {variant.graph}: it has {', '.join(reference.graphs)}",
            hint="compare bundles with the same graphs",
        )
    if bundle.graphs[variant.graph] != reference.graphs[variant.graph]:
        raise UsageError(
            f"{bundle.path} and {reference.path} take other times: at least one of them has tables for its own steps",
            hint="build both with the same --fold-steps, or none",
        )
    without, theirs = (sorted(other.manifest.get("no_passes", ())) for other in (bundle, reference))
    if without != theirs:
        raise UsageError(
            f"{bundle.path} and {reference.path} have other nodes by design: {_passes(without)} and {_passes(theirs)}",
            hint="compare each with PyTorch, or build both with the same --no-pass",
        )
    a, b = (other.manifest["precision"] for other in (reference, bundle))
    if a["name"] != FLOAT32 and b["name"] == FLOAT32:
        raise UsageError(
            f"{reference.path} is {a['name']} and cannot be the reference of {bundle.path}, which is float32",
            hint=f"dexport diff {bundle.path} {reference.path}",
        )
    yield _compare(str(reference.path), reference.model_path(variant.graph), bundle, variant, reference)


def _passes(without: Sequence[str]) -> str:
    return f"graph passes without {', '.join(without)}" if without else "all graph passes"


def _short(ours: Any, theirs: Any) -> str:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        name = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        return f"{name}={ours.get(name)!r} in the first and {theirs.get(name)!r} in the second"
    return f"{ours!r} in the first and {theirs!r} in the second"


def _compare(name: str, path: Path, bundle: Network, variant: Variant, other: Network | None = None) -> Comparison:
    """A bundle beside the graph at ``path``, which is that of ``other`` or, without, a float32 export."""
    precision, islands = bundle.manifest["precision"]["name"], islands_of(bundle.manifest)
    reference = CutGraph(_arranged_like(bundle, path), path.parent)
    actual = CutGraph(_arranged_like(other, bundle.model_path(variant.graph)), bundle.path)
    exact = other is None or other.manifest["precision"]["name"] == FLOAT32

    def convert(islands: Islands) -> CutGraph:
        model = _arranged_like(bundle, path)
        if precision != FLOAT32:
            ToLowPrecision(precision, islands)(model)
        return CutGraph(model, path.parent)

    # Quantised layers are no conversion of the reference: what they should compute is not known here.
    convertible = exact and _quantised_nodes(reference) == _quantised_nodes(actual)
    expected = None
    if convertible:
        expected = convert(islands)
    elif other is not None and other.manifest["precision"] == bundle.manifest["precision"]:
        expected = reference
    found = tuple(differences(expected.model, actual.model)) if expected else ()
    paths = block_paths(variant.outline)
    return Comparison(
        name=name,
        reference=reference,
        actual=actual,
        expected=expected if found else expected and actual,
        differences=found,
        layout=lay_out(reference, actual, paths),
        convert=convert if convertible else None,
        paths=paths,
    )


def _arranged_like(bundle: Network | None, path: Path) -> ir.Model:
    """The graph at ``path``, with the layouts of a bundle's where that is quantised, so that shapes agree."""
    model = read_graph(path)
    if bundle is not None and bundle.manifest["precision"]["layers"]:
        passes.arrange_for_integers(bundle.manifest.get("no_passes", ()))(model)
    return model


def _quantised_nodes(graph: CutGraph) -> int:
    return sum(node.op_type in QUANTISED for node in graph.model.graph)


def islands_of(manifest: Mapping[str, Any]) -> Islands:
    """The islands of a bundle."""
    islands = manifest["precision"]["islands"]
    return Islands(**{kind: tuple(patterns) for kind, patterns in islands.items()}) if islands else NO_ISLANDS


def example_inputs(variant: Variant, seed: int = 0) -> dict[str, np.ndarray]:
    """The recipe's example inputs."""
    return variant.signature.example(ROWS if variant.recipe.has_program else IMAGE_ROWS, seed)


def trajectory_inputs(variant: Variant, weights: WeightSource, seed: int = 0) -> dict[str, np.ndarray]:
    """States of short sampling runs with PyTorch, evenly spread over their steps, one image each.

    Raises:
        UsageError: the network has no program.
    """
    if not variant.recipe.has_program:
        raise UsageError(f"{variant.recipe.name} has no program, and so no trajectory", hint="--states example")
    network = RecordingNetwork(variant, load_into(weights, variant.meta_module()).eval())
    steps = variant.table.steps if variant.table else STEPS
    for _ in sample_batches(variant, network, Calibration(FEWEST_IMAGES, seed, steps), 0, lambda *_: None):
        pass
    calls = [call.inputs for call in network.made if call.graph == variant.graph]
    chosen = [calls[round(n * (len(calls) - 1) / (ROWS - 1))] for n in range(ROWS)]
    inputs = variant.signature.example(ROWS, seed)
    for spec in variant.signature.inputs:
        if BATCH in spec.shape:
            inputs[spec.name] = np.stack([call[spec.name][row] for row, call in enumerate(chosen)])
    return inputs


def block_errors(
    bundle: Network,
    variant: Variant,
    weights: WeightSource,
    allowed: float,
    inputs: Mapping[str, np.ndarray] | None = None,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> tuple[BlockError, ...]:
    """The errors of every block of a bundle against a float32 export of its recipe and checkpoint.

    What is stored otherwise than an export would store it shows here even where its effect on the outputs is less than
    a gate allows; whether the export computes what PyTorch computes is another check.

    Args:
        allowed: largest own error of a block, relative L2.
        inputs: by name; the recipe's examples where there are none.
    """
    with beside_export(bundle, variant, weights) as comparison:
        errors: dict[str, Deviation] = {}
        for swept in sweep(
            comparison.layout,
            comparison.reference,
            comparison.actual,
            comparison.expected,
            inputs or example_inputs(variant),
            allowed,
            on_progress,
        ):
            errors |= swept.errors
        return by_block(comparison.layout, errors, comparison.decisive)
