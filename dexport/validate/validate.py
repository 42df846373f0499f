"""``dexport validate``: an existing bundle against PyTorch, level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dexport.bundle import Bundle, Network
from dexport.choices import DEFAULT_LEVELS, LEVELS
from dexport.errors import GateError, InputError, MachineError, UsageError
from dexport.exporter.gates import NetworkGates, gates_of
from dexport.exporter.origin import variant_of, weights_of
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.torch_session import TorchSession
from dexport.exporter.variant import Variant
from dexport.hashing import sha256_of
from dexport.limits import check_pictures
from dexport.places import check_place
from dexport.runtime.guidance import check_labels
from dexport.runtime.opened import OpenProgram
from dexport.validate.compare.block_errors import BlockError
from dexport.validate.compare.graph_pair import block_errors
from dexport.validate.features.evaluator import Evaluator, open_evaluator
from dexport.validate.features.lpips import open_lpips
from dexport.validate.features.statistics import check_images, holds_statistics, read_statistics
from dexport.validate.gates import LOSSY, Gate, Limits, check_limits, delta_metrics, verdict_of
from dexport.validate.images.picture_metrics import PictureDistance
from dexport.validate.images.sampled_sets import fingerprint
from dexport.validate.judging import (
    block_gates,
    distribution_gates,
    forward_gates,
    not_compared,
    op_gates,
    trajectory_gates,
)
from dexport.validate.levels.distribution import DistributionReport, check_distribution
from dexport.validate.levels.forward import ParityReport, check_parity, open_graph
from dexport.validate.levels.ops import NO_OPS, OpReport, check_ops
from dexport.validate.levels.trajectory import TrajectoryReport, check_trajectory
from dexport.validate.references.recipe_network import torch_session
from dexport.validate.references.user_module import session_against
from dexport.validate.report.baseline import Baseline, Change, changes, check_comparable, judged
from dexport.validate.report.document import Run, document
from dexport.verdict import Loss
from dexport.version import __version__

SAMPLED = ("trajectory", "distribution")
OF_PICTURES = ("psnr", "ssim", "lpips")
NO_PICTURES = "pictures: the bundle makes none, so the states were compared"
NO_PROGRAM = "the bundle has no program"
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Distribution:
    """What the level ``distribution`` takes besides the settings of the sampling.

    Attributes:
        real: real images: a folder of PNG files, an ``.npz`` of images, or ADM's statistics.
        evaluator, weights: the feature network and the file of its weights, None for an installed package's.
        count: images per class.
        work: folder for pictures and features; None for ``NAME.validation`` beside the bundle.
    """

    real: Path | None = None
    evaluator: str = "inception"
    weights: Path | None = None
    count: int = 10
    batch: int = 8
    work: Path | None = None


@dataclass(frozen=True)
class Validation:
    """What was compared: the ops and forward parity of every network by name, and the sampling of the whole.

    Attributes:
        run: what was asked for.
        blocks: errors of every block by itself, by network.
        gates: every judged metric.
        changes: against a baseline; empty without one.
        not_run: levels, or parts of them, that were asked for and did not run, and why.
    """

    run: Run
    ops: OpReport | None
    forward: Mapping[str, ParityReport]
    trajectory: TrajectoryReport | None
    distribution: DistributionReport | None
    gates: tuple[Gate, ...]
    not_run: tuple[str, ...]
    blocks: Mapping[str, tuple[BlockError, ...]] = field(default_factory=dict)
    baseline: Baseline | None = None
    changes: tuple[Change, ...] = ()

    @property
    def bundle(self) -> str:
        """The name of what was validated."""
        return self.run.bundle.manifest["name"]

    @property
    def verdict(self) -> str:
        """``passed``, ``lossy``, ``failed``, ``inconclusive``, or ``not run`` where nothing was judged."""
        return verdict_of([gate.verdict for gate in self.gates], [change.verdict for change in self.changes])

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def loss(self) -> Loss:
        """What was lost, as far as the levels that ran measured it."""
        found = Loss().worst(report.loss for report in self.forward.values())
        return found if self.trajectory is None else replace(self.trajectory.loss, relative_l2=found.relative_l2)

    @property
    def acceptable(self) -> bool:
        """Whether it passed, or lost what was accepted."""
        return self.passed or (self.verdict == LOSSY and self.run.accepted)

    def to_json(self) -> dict[str, Any]:
        """The report; see :mod:`dexport.validate.report.document`."""
        report = document(
            self.run,
            ops=None if self.ops is None else self.ops.to_json(),
            forward={name: report.to_json() for name, report in self.forward.items()} or None,
            trajectory=None if self.trajectory is None else self.trajectory.to_json(),
            distribution=None if self.distribution is None else self.distribution.to_json(),
            blocks=[
                {**block.to_json(), "path": ": ".join(filter(None, (name, block.path)))}
                for name, blocks in self.blocks.items()
                for block in blocks
            ]
            or None,
            gates=[gate.to_json() for gate in self.gates],
            not_run=list(self.not_run),
        )
        return report if self.baseline is None else judged(report, self.baseline)


@fresh_torch()
def validate(
    bundle: Bundle,
    levels: Sequence[str] | None = None,
    *,
    checkpoints: Mapping[str, str] | None = None,
    recipe: Recipe | None = None,
    against: Mapping[str, str] | None = None,
    labels: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    distribution: Distribution | None = None,
    limits: Limits | None = None,
    baseline: Baseline | None = None,
    accept_loss: bool = False,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Validation:
    """Compare a bundle with the float32 PyTorch networks that it was built from.

    Args:
        levels: ``op`` (every custom op and every block by itself), ``forward`` (single evaluations of every network),
            ``trajectory`` (whole sampling runs, step by step), ``distribution`` (many images and their distances to
            real ones). None for those of ``DEFAULT_LEVELS`` that the bundle can have.
        checkpoints: where the weights are now, by network; ``""`` is the main one.
        recipe: for a bundle that was built from a recipe of one's own.
        against: modules of the user's own, ``file.py:Class`` by network, in place of dexport's networks.
        labels: for the trajectory one image each, by default classes 0 and 1; for the distribution ``count`` each,
            by default of all classes.
        settings: of the program, by name.
        limits: of gates, in place of those of the recipe and the precision.
        baseline: an earlier validation that this one may not fall behind.
        accept_loss: more may be lost than is fit to ship; see :mod:`dexport.verdict`.

    Raises:
        UsageError: an unknown level or network, sampling of something that cannot be sampled, weights that are gone,
            limits on what is not measured.
        InputError: weights that are not those of the build, a reference that does not fit.
    """
    limits, chosen = limits or Limits(), distribution or Distribution()
    levels = _levels(bundle, levels)
    program = _program(bundle, levels, labels, settings or {}, limits)
    networks = networks_of(bundle)
    checkpoints, against = (_by_network(given or {}, networks) for given in (checkpoints, against))
    evaluator = _open_evaluator(chosen) if "distribution" in levels else None
    lpips = _open_lpips(limits) if "trajectory" in levels else None
    check_limits(limits, levels, evaluator)
    run = _run(bundle, program, levels, against, labels, seed, chosen, evaluator, accept_loss)
    if baseline is not None:
        check_comparable(baseline, run)

    forward: dict[str, ParityReport] = {}
    references: dict[tuple[str, str], TorchSession] = {}
    judging: dict[str, NetworkGates] = {}
    ops: list[OpReport] = []
    blocks: dict[str, tuple[BlockError, ...]] = {}
    given = recipes_of(networks, recipe)
    for name, part in networks.items():
        variant = variant_of(part, given[name])
        weights = weights_of(part.manifest["weights"], variant, checkpoints.get(name))
        judging[name] = judge = gates_of(part.manifest["precision"], variant.recipe.gates)
        for each in variant.each:
            label = label_of(name, each)
            own = session_against(against[name], each, weights) if name in against else None
            model = part.model_path(each.graph)
            if "op" in levels:
                on_progress(0, 1, f"{label} ops")
                ops.append(check_ops(label, model, limit=limits.given.get("op_l2"), seed=seed))
                allowed = limits.get("block_l2", judge.block_l2)
                blocks[label] = block_errors(part, each, weights, allowed, on_progress=on_progress)
            if "forward" in levels:
                forward[label] = check_parity(
                    each,
                    weights,
                    model,
                    precision=part.manifest["precision"]["name"],
                    gate=judge.name,
                    limit=limits.get("relative_l2", judge.relative_l2),
                    session=own,
                    max_batch=part.manifest["batch"]["max"],
                    on_progress=on_progress,
                )
            if set(levels) & set(SAMPLED):
                references[part.name, each.graph] = own or torch_session(each, weights)

    op_report = OpReport(tuple(c for r in ops for c in r.checks), tuple(t for r in ops for t in r.not_run))
    gates = [*op_gates(op_report, limits), *block_gates(blocks, limits), *forward_gates(forward, limits)]
    not_run = [f"{level}: {_why_not(bundle, level)}" for level in LEVELS if level not in levels]
    not_run += [f"op: {reason}" for reason in op_report.not_run]
    if "op" in levels and not op_report.checks and not op_report.not_run:
        not_run.append(f"op: {NO_OPS}")
    not_run += [f"op: {reason}" for reason in not_compared(blocks, limits)]
    result = Validation(
        run,
        op_report if "op" in levels else None,
        forward,
        None,
        None,
        tuple(gates),
        (*not_run, *(f"forward: {reason}" for report in forward.values() for reason in report.not_run)),
        blocks,
        baseline,
    )
    if references:
        result = _sampled(result, references, judging, limits, chosen, evaluator, lpips, on_progress)
    if baseline is None:
        return result
    return replace(result, changes=changes(baseline, result.to_json()))


def _levels(bundle: Bundle, asked: Sequence[str] | None) -> Sequence[str]:
    """The levels to run; what cannot be had is refused before any work."""
    runs = bundle.program is not None
    levels = asked or [level for level in DEFAULT_LEVELS if runs or level not in SAMPLED]
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise UsageError(f"no level {', '.join(unknown)}", hint=f"choose from {', '.join(LEVELS)}")
    sampled = [level for level in levels if level in SAMPLED]
    if sampled and not runs:
        raise InputError(
            f"{bundle.path} cannot be sampled: {NO_PROGRAM}", hint=f"leave out --level {' and '.join(sampled)}"
        )
    return levels


def _program(
    bundle: Bundle, levels: Sequence[str], labels: Sequence[int] | None, settings: Mapping[str, Any], limits: Limits
) -> OpenProgram | None:
    """The program with its settings, for the levels that run it; what cannot be had is refused, and nothing loaded."""
    sampled = [level for level in levels if level in SAMPLED]
    if not sampled:
        return None
    if labels is not None and not labels:
        raise UsageError("sampling needs at least one image", hint="give a label, or leave out --classes")
    program = OpenProgram(bundle).with_settings(**settings)
    program.rehearse()
    if labels is not None and program.classes is not None:
        check_labels(labels, program.classes)
    pictures = [*(level for level in levels if level == "distribution"), *(m for m in OF_PICTURES if m in limits.given)]
    if pictures:
        program.check_pictures(f", and {', '.join(pictures)} needs pictures")
    return program


def _by_network(given: Mapping[str, str], networks: Mapping[str, Network]) -> dict[str, str]:
    """What was given for networks, by the names of :func:`networks_of`; ``""`` is the main one."""
    names = {network.name: name for name, network in networks.items()}
    main = next(iter(networks))
    unknown = [name for name in given if name and name not in names]
    if unknown:
        raise UsageError(f"the bundle has no network {unknown[0]!r}", hint=f"it has {', '.join(names)}")
    return {names[name] if name else main: value for name, value in given.items()}


def _why_not(bundle: Bundle, level: str) -> str:
    if level in SAMPLED and bundle.program is None:
        return NO_PROGRAM
    return f"not asked for (--level {level})"


def _sampled(
    result: Validation,
    references: Mapping[tuple[str, str], TorchSession],
    judging: Mapping[str, NetworkGates],
    limits: Limits,
    chosen: Distribution,
    evaluator: Evaluator | None,
    lpips: PictureDistance | None,
    on_progress: OnProgress,
) -> Validation:
    """Add the levels that run the program of the bundle."""
    run = result.run
    assert run.program is not None
    settings = run.program.values

    def opened(open_graph: Callable[[Network, str], Any]) -> OpenProgram:
        return OpenProgram(run.bundle, open_graph=open_graph).with_settings(**settings)

    program = opened(lambda network, graph: open_graph(kind_of(network), network.model_path(graph)))
    reference = opened(lambda network, graph: references[network.name, graph])
    pictures = program.pictures
    snr_db = min(gates.snr_db for gates in judging.values())
    share = max(gates.distance_share for gates in judging.values())
    if "trajectory" in run.levels:
        try:
            trajectory = check_trajectory(
                program,
                reference,
                run.labels,
                seed=run.seed,
                gate_snr_db=limits.get("snr", snr_db),
                gate_l2=limits.get("evaluation_l2", max(gates.relative_l2 for gates in judging.values())),
                lpips=lpips,
                on_progress=on_progress,
            )
        except GateError as error:  # a decoder whose values are not finite: a finding, as below
            broken = Gate("psnr", None, limits.get("psnr", math.inf), limits.source("psnr"), str(error))
            result = replace(result, gates=(*result.gates, broken), not_run=(*result.not_run, f"trajectory: {error}"))
        else:
            result = replace(
                result,
                trajectory=trajectory,
                gates=(*result.gates, *trajectory_gates(trajectory, limits)),
                not_run=result.not_run if pictures else (*result.not_run, f"trajectory: {NO_PICTURES}"),
            )
    if evaluator is None:
        return result
    assert chosen.real is not None
    place = run.bundle.path.absolute()
    classes = run.classes(program.classes)
    check_pictures(len(classes), chosen.count)
    labels = [label for label in classes for _ in range(chosen.count)]
    try:
        report = check_distribution(
            program,
            reference,
            labels,
            evaluator=evaluator,
            real=chosen.real,
            work=chosen.work or place.with_name(f"{place.name}.validation"),
            identity=run.identity,
            batch=chosen.batch,
            seed=run.seed,
            on_progress=on_progress,
        )
    except GateError as error:  # values that are not finite: a finding, and the other levels have theirs
        name = delta_metrics(evaluator)[0]
        broken = Gate(name, None, limits.get(name, math.inf), limits.source(name), str(error))
        return replace(result, gates=(*result.gates, broken), not_run=(*result.not_run, f"distribution: {error}"))
    return replace(
        result,
        distribution=report,
        gates=(*result.gates, *distribution_gates(report, evaluator, limits, share)),
        not_run=(*result.not_run, *(f"distribution: {reason}" for reason in report.not_run)),
    )


def _open_evaluator(chosen: Distribution) -> Evaluator:
    """The feature network, after everything about the level that can be refused has been."""
    if chosen.real is None:
        raise UsageError(
            "the level distribution compares with real images, and there are none",
            hint="give them with --reference: a folder of PNG files, an .npz file, or ADM's statistics",
        )
    if not chosen.real.exists():
        raise UsageError(
            f"--reference {chosen.real} does not exist", hint="give a folder of PNG files, or an .npz file"
        )
    if chosen.count < 1 or chosen.batch < 1:
        raise UsageError(f"--count {chosen.count}, --batch {chosen.batch}: both start at 1", hint="give 1 or more")
    if chosen.work is not None:
        check_place(chosen.work / "pictures")
    check_images(chosen.real)
    evaluator = open_evaluator(chosen.evaluator, chosen.weights)
    if holds_statistics(chosen.real):
        read_statistics(chosen.real, evaluator)
    return evaluator


def _open_lpips(limits: Limits) -> PictureDistance | None:
    """LPIPS where its weights are here; without them only a limit on it is an error."""
    try:
        return open_lpips()
    except MachineError:
        if "lpips" in limits.given:
            raise
        return None


def _run(
    bundle: Bundle,
    program: OpenProgram | None,
    levels: Sequence[str],
    against: Mapping[str, str],
    labels: Sequence[int] | None,
    seed: int,
    chosen: Distribution,
    evaluator: Evaluator | None,
    accept_loss: bool,
) -> Run:
    parts = networks_of(bundle)
    references = {name: {"module": address, "sha256": _sha256_of_module(address)} for name, address in against.items()}
    identity = {
        "files": {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()},
        "weights": {name: part.manifest["weights"]["sha256"] or "random" for name, part in parts.items()},
        "reference": {"dexport": __version__, "modules": references},
    }
    measured = None
    if evaluator is not None:
        assert chosen.real is not None
        measured = {"evaluator": evaluator.name, "weights_sha256": evaluator.sha256, "count": chosen.count}
        measured["real_sha256"] = fingerprint(chosen.real)
    return Run(
        bundle=bundle,
        parts=parts,
        levels=tuple(level for level in LEVELS if level in levels),
        given_labels=None if labels is None else tuple(labels),
        program=None if program is None else program.program,
        seed=seed,
        distribution=measured,
        identity=identity,
        accept_loss=accept_loss,
    )


def _sha256_of_module(address: str) -> str:
    path = Path(address.rpartition(":")[0])
    return sha256_of(path) if path.is_file() else ""


def kind_of(network: Network) -> str:
    """Half precision is judged with every rounding made explicit, as ONNX Runtime leaves it out on a CPU."""
    return "as shipped" if network.manifest["precision"]["name"] == "fp32" else "rounded"


def recipes_of(networks: Mapping[str, Network], recipe: Recipe | None) -> dict[str, Recipe | None]:
    """A recipe of one's own for the networks that were built from it; for all, which is refused later, if none was."""
    names = {name: network.manifest["recipe"]["name"] for name, network in networks.items()}
    if recipe is None or recipe.name not in names.values():
        return dict.fromkeys(networks, recipe)
    return {name: recipe if built_from == recipe.name else None for name, built_from in names.items()}


def networks_of(bundle: Bundle) -> dict[str, Network]:
    """Every network of a bundle by name; ``""`` where there is one, so that its figures need no prefix."""
    networks = bundle.networks
    return {"": bundle.network} if len(networks) == 1 else dict(networks)


def label_of(name: str, variant: Variant) -> str:
    """What the figures of a graph are called: by its network, and by itself where the network has several."""
    return " ".join(filter(None, (name, variant.graph if len(variant.graphs) > 1 else "")))
