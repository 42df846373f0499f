"""``dexport bench``: how long one evaluation of a model takes, beside PyTorch eager and beside another model.

Speed does not depend on values: inputs are noise, and where the checkpoint is gone PyTorch gets random weights. Without
torch the model is timed by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dexport.bundle import load_bundle, network_of
from dexport.errors import DexportError, MachineError, UsageError
from dexport.runtime.inputs import NUMPY_TYPES, NamedPort
from dexport.validate.bench.contestants import Model, Opener, Run, Side
from dexport.validate.bench.timing import Clock, Estimate, Times, estimate, take_turns
from dexport.validate.gates import FAIL, INCONCLUSIVE, METRICS, PASS, UNDER, Gate, Limits

if TYPE_CHECKING:  # timing a bundle needs no torch
    from dexport.validate.bench.torch_baseline import Eager

MODEL, OTHER, PYTORCH, PRODUCT = "model", "other", "PyTorch", "matrix product"
CPU = "cpu"
DEFAULT_ROUNDS = 7
QUIET = 0.5
"""Load that a machine has when nothing else runs on it."""
SPREAD = 2.0
"""Factor between the ends of an interval above which a ratio says nothing, on whichever side of a limit it lies."""
WORSE = (PASS, INCONCLUSIVE, FAIL)
"""Verdicts, from best to worst."""


@dataclass(frozen=True)
class Row:
    """What one side took at one batch size.

    Attributes:
        runner: what really ran.
        wall_ms, fastest_ms, cpu_ms: of one evaluation: median and minimum by the clock, median of processor time.
        images_per_s: rows of the batch over the median.
        speedup: PyTorch's median on the same device over this one; None where PyTorch did not run.
        speedup_against: that of the other model's file of the same kind over this one.
        of_peak: the share of the rate of a large float32 matrix product; None on a GPU, or without torch.
    """

    owner: str
    kind: str
    runner: str
    wall_ms: float
    fastest_ms: float
    cpu_ms: float
    images_per_s: float
    speedup: float | None
    speedup_against: float | None
    of_peak: float | None


@dataclass(frozen=True)
class Measured:
    """One metric of the model at one batch, with its interval."""

    metric: str
    where: str
    estimate: Estimate


@dataclass(frozen=True)
class Result:
    """All sides at one batch size; ``gflop`` of one evaluation, and the ``peak_gflop_s`` of this CPU."""

    batch: int
    gflop: float | None
    peak_gflop_s: float | None
    load: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class BenchReport:
    """Everything that was timed.

    Attributes:
        notes: what the figures depend on and do not show.
        not_run: what was not timed, and why.
    """

    model: str
    other: str | None
    threads: int
    rounds: int
    results: tuple[Result, ...]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...]
    not_run: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(gate.verdict == PASS for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"passed": self.passed, **asdict(self), "gates": [gate.to_json() for gate in self.gates]}


def bench(
    path: Path,
    *,
    against: Path | None = None,
    require_signature: str | Path | None = None,
    recipe: str | None = None,
    checkpoint: str | None = None,
    batches: Sequence[int] = (),
    threads: int | None = None,
    rounds: int = DEFAULT_ROUNDS,
    provider: str = CPU,
    limits: Limits | None = None,
    wall: Clock = time.perf_counter,
    cpu: Clock = time.process_time,
    ports: Mapping[str, str] | None = None,
    network: str | None = None,
    graph: str = "",
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> BenchReport:
    """Time a model, PyTorch eager in float32, and another model where there is one, in turns.

    Args:
        path: a bundle's folder, or an ONNX file that something else made; then ``recipe`` says what PyTorch computes.
        against: another bundle or ONNX file with the same inputs.
        recipe: a name, or a file with a recipe of one's own.
        checkpoint: where the weights are, if not where they were.
        network, graph: of a bundle, by name; by default the main ones.
        batches: batch sizes; by default the profile's usual one.
        threads: of the CPU, for every side; by default one per core.
        provider: ``cpu`` or ``cuda``, for ONNX files. An engine runs wherever it can.
        limits: of ``speedup``, ``speedup_against`` and ``wall_ms``; the worst batch and file of the model counts. What
            this machine cannot decide is inconclusive, and no pass: see :func:`_judge`.
        ports: the network's names of inputs and outputs -> those of the ONNX file at ``path``, where they differ.

    Raises:
        UsageError: numbers below 1, a limit on what is not measured, a stitched bundle, a batch that a side lacks.
        InputError: a damaged model, or one with other inputs than the first.
        MachineError: the provider, or what a limit needs, is missing.
    """
    limits = limits or Limits()
    threads = threads or os.cpu_count() or 1
    if min(threads, rounds, *batches) < 1:
        raise UsageError("--threads, --rounds and --batch start at 1", hint="give 1 or more")
    if "speedup_against" in limits.given and against is None:
        raise UsageError("speedup_against has a limit, and there is no other model", hint="add --against OTHER")
    if ports and path.suffix != ".onnx":
        raise UsageError(f"--port is for ONNX files, and {path} is a bundle", hint="leave it out")
    if require_signature is not None and any(one.suffix == ".onnx" for one in (path, against) if one is not None):
        raise UsageError("an ONNX file has no signature", hint="give bundles, or leave out --require-signature")
    busy = _busy(load := os.getloadavg()[0], threads)
    opener = Opener(provider, threads, ports or {}, require_signature, network, graph)
    model, open_eager = _open(opener, path, recipe, checkpoint)
    models = [model] if against is None else [model, opener.beside(against, OTHER, model)]
    sides = [side for one in models for side in one.sides]
    not_run = [reason for one in models for reason in one.not_run]
    batches = tuple(dict.fromkeys(batches or (model.usual_batch,)))
    on_progress(0, len(batches) * rounds, PYTORCH)
    work: dict[str, Run] = {}
    eager: Eager | None = None
    with ExitStack() as stack:
        try:
            eager = open_eager()
            sides += _eager_sides(eager, dict.fromkeys(side.device for side in sides))
            work[PRODUCT] = _product(stack, threads)
        except DexportError as error:
            if "speedup" in limits.given:
                raise
            not_run.append(f"{PYTORCH}: {error}")
        work |= {side.name: side.run for side in sides}
        results: list[Result] = []
        measured: list[Measured] = []
        for batch in batches:
            inputs = example(model.inputs, batch)

            def tell(done: int, batch: int = batch) -> None:
                on_progress(len(results) * rounds + done, len(batches) * rounds, f"batch {batch}, round {done + 1}")

            turns = {name: partial(run, inputs) for name, run in work.items()}
            times = take_turns(turns, rounds, wall=wall, cpu=cpu, on_round=tell)
            results.append(_result(batch, load, sides, times, eager))
            measured += _measured(batch, sides, times)
    return BenchReport(
        model=str(path),
        other=None if against is None else str(against),
        threads=threads,
        rounds=rounds,
        results=tuple(results),
        gates=tuple(_gates(measured, limits, busy)),
        notes=(*(note for one in models for note in one.notes), *_notes(eager, busy)),
        not_run=tuple(not_run),
    )


def example(ports: Iterable[NamedPort], batch: int) -> dict[str, np.ndarray]:
    """Inputs to time with: noise, and zeros for integers."""
    rng = np.random.default_rng(0)
    inputs = {}
    for port in ports:
        shape = [size if isinstance(size, int) else batch for size in port.shape]
        dtype = NUMPY_TYPES.get(port.type, np.dtype(np.int64))
        accepted = getattr(port, "accepted", None)  # ONNX Runtime's own ports have none
        if accepted is not None:
            inputs[port.name] = np.full(shape, accepted.example, dtype)
        else:
            floating = dtype == np.float32
            inputs[port.name] = rng.standard_normal(shape, dtype) if floating else np.zeros(shape, dtype)
    return inputs


def _open(opener: Opener, path: Path, recipe: str | None, checkpoint: str | None) -> tuple[Model, Callable[[], Eager]]:
    """The model, and what opens PyTorch's side of it."""
    if path.suffix == ".onnx":
        if recipe is None:
            raise UsageError(f"{path} does not say what it computes", hint=f"dexport bench {path} --recipe NAME")
        model, eager = opener.file(path, MODEL, recipe, checkpoint)
        return model, lambda: eager
    bundle = load_bundle(path, opener.require_signature)

    def of_bundle() -> Eager:
        try:
            from dexport.validate.bench.torch_baseline import Eager
        except ModuleNotFoundError as error:
            raise MachineError(f"{error.name} is not installed", hint="pip install dexport") from error
        return Eager.of_network(network_of(bundle, opener.network, opener.graph), opener.graph, recipe, checkpoint)

    return opener.bundle(bundle, MODEL), of_bundle


def _eager_sides(eager: Eager, devices: Iterable[str]) -> Iterable[Side]:
    for device in devices:
        session = eager.session(device)
        yield Side(PYTORCH, device, session.runner, device, lambda given, session=session: session(**given))  # type: ignore[misc]


def _product(stack: ExitStack, threads: int) -> Run:
    from dexport.exporter.pytorch.state import fresh_torch
    from dexport.exporter.pytorch.threads import torch_threads
    from dexport.validate.bench.torch_baseline import matrix_product

    stack.enter_context(fresh_torch())
    stack.enter_context(torch_threads(threads))
    product = matrix_product()
    return lambda _inputs: product()


def _result(batch: int, load: float, sides: Sequence[Side], times: Mapping[str, Times], eager: Eager | None) -> Result:
    flops = peak = None
    if eager is not None and PRODUCT in times:
        from dexport.validate.bench.torch_baseline import PRODUCT_FLOPS

        flops, peak = eager.flops(batch), PRODUCT_FLOPS / times[PRODUCT].fastest
    references = {side.device: times[side.name].median for side in sides if side.owner == PYTORCH}
    others = {side.kind: times[side.name].median for side in sides if side.owner == OTHER}
    rows = []
    for side in sides:
        taken = times[side.name]
        row = Row(
            owner=side.owner,
            kind=side.kind,
            runner=side.runner,
            wall_ms=taken.median * 1e3,
            fastest_ms=taken.fastest * 1e3,
            cpu_ms=taken.median_cpu * 1e3,
            images_per_s=batch / taken.median,
            speedup=_ratio(references.get(side.device), taken.median),
            speedup_against=_ratio(others.get(side.kind), taken.median),
            of_peak=flops / taken.fastest / peak if flops and peak and side.device == CPU else None,
        )
        rows.append(row)
    return Result(batch, flops and flops / 1e9, peak and peak / 1e9, load, tuple(rows))


def _ratio(theirs: float | None, ours: float) -> float | None:
    return None if theirs is None else theirs / ours


def _busy(load: float, threads: int) -> str:
    """That other programs take the cores, which is half a sentence; empty on a quiet machine."""
    cores = os.cpu_count() or 1
    return f"the machine was busy: a load of {load:.1f} on {cores} cores" if load + threads > cores + QUIET else ""


def _notes(eager: Eager | None, busy: str) -> Iterable[str]:
    if eager is not None and eager.note:
        yield eager.note
    if busy:
        yield (
            f"{busy}. A side whose threads wait for each other, such as PyTorch, loses most by that; fewer --threads "
            "make the ratios fairer"
        )


def _measured(batch: int, sides: Sequence[Side], times: Mapping[str, Times]) -> Iterable[Measured]:
    """What can be limited. Ratios are taken round by round: what slowed a round down slowed both sides."""
    references = {side.device: times[side.name] for side in sides if side.owner == PYTORCH}
    others = {side.kind: times[side.name] for side in sides if side.owner == OTHER}
    for side in sides:
        if side.owner != MODEL:
            continue
        ours, where = times[side.name], f"{side.kind}, batch {batch}"
        yield Measured("wall_ms", where, estimate([seconds * 1e3 for seconds in ours.wall]))
        for metric, theirs in (("speedup", references.get(side.device)), ("speedup_against", others.get(side.kind))):
            if theirs is not None:
                ratios = estimate([a / b for a, b in zip(theirs.wall, ours.wall, strict=True)])
                yield Measured(metric, where, replace(ratios, value=theirs.median / ours.median))


def _gates(measured: Sequence[Measured], limits: Limits, busy: str) -> Iterable[Gate]:
    """Every limited metric at the batch and the file of the model where it is worst."""
    for metric, limit in limits.given.items():
        gates = [
            _judge(one, limit, limits.source(metric), busy, METRICS[metric].option == UNDER)
            for one in measured
            if one.metric == metric
        ]
        sign = -1 if METRICS[metric].option == UNDER else 1
        yield max(gates, key=lambda gate: (WORSE.index(gate.verdict), sign * (gate.value or 0.0)))


def _judge(one: Measured, limit: float, source: str, busy: str, more_is_better: bool) -> Gate:
    """A gate, which is inconclusive where

    - the interval of the median lies on both sides of the limit;
    - the rounds differ too much for a ratio to mean anything;
    - other programs took the cores: they slow one side down more than the other.

    Other programs only ever take time: a time that is within its limit all the same is.
    """
    found = one.estimate
    gate = Gate(one.metric, found.value, limit, source, one.where, found.low, found.high)
    inside = found.low >= limit if more_is_better else found.high <= limit
    if inside and one.metric == "wall_ms":
        return gate
    outside = found.high < limit if more_is_better else found.low > limit
    if not inside and not outside:
        return replace(gate, undecided="its interval spans the limit: more --rounds, or a quieter machine, settle it")
    if found.high > SPREAD * found.low:
        reason = f"its interval spans a factor of {found.high / found.low:.1f}: measure on a quieter machine"
        return replace(gate, undecided=reason)
    return replace(gate, undecided=f"{busy}: measure again when it is quiet") if busy else gate
