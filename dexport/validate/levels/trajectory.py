"""Trajectory parity: the same draws and labels through the program, with PyTorch and with the bundle.

Two errors per step tell different things. The *state* error is that of two free runs, which may accumulate or heal. The
*local* error is that of one evaluation at the reference's own state, so it cannot hide behind what happened before.

Where states are ids, a free run goes another way after the first one that fell otherwise. So every step is also run at
the reference's own state, and the ids that it decides otherwise are counted: with the same draws, these are the ones
whose candidates lie within the error of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dexport.contract import TIME, Clock
from dexport.errors import GateError, UsageError
from dexport.exporter.gates import GATES
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.generate import caption
from dexport.runtime.guidance import in_unit
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Calls, Network, Program, Request, Step
from dexport.validate.images.picture_metrics import LPIPS_SMALLEST, PictureDistance, ssim
from dexport.validate.images.picture_pairs import Histogram, Pair, compare_pictures, error_histogram
from dexport.validate.levels.forward import finite_or_null
from dexport.validate.metrics import Metrics, compare
from dexport.verdict import PASSED, SHIPPABLE_L2, Loss, status_of

DEFAULT_SNR: dict[str, float] = {name: limits.snr_db for name, limits in GATES.items()}
"""Smallest signal-to-noise ratio in dB of the final latents."""
NOTABLE = 1.5
"""Factor by which an error has to change to be called growing or healing."""


@dataclass(frozen=True)
class At:
    """An error at a time: that of the step, or that the network received."""

    t: float
    metrics: Metrics


@dataclass(frozen=True)
class Tokens:
    """Ids that steps decide at the reference's states, with the same draws.

    Attributes:
        decided: how many.
        otherwise: how many of them the bundle decides otherwise, by step.
        equal: share of the ids that are the same in the end of two free runs.
        gate_l2: largest error allowed of the logits by which they are decided. How many ids fall otherwise by it
            depends on how many candidates there are, not on the export.
    """

    decided: int
    otherwise: tuple[int, ...]
    equal: float
    gate_l2: float

    @property
    def share(self) -> float:
        """Of the decided ids, those that are the same."""
        return max(0.0, 1 - sum(self.otherwise) / max(1, self.decided))


@dataclass(frozen=True)
class TrajectoryReport:
    """Errors along one trajectory.

    Attributes:
        run: what ran, in words.
        states: error of the state after each step, of two free runs.
        evaluations: error of each evaluation at the reference's states.
        psnr_db, ssim: of every picture, bundle against PyTorch; empty where values are not finite, or not decoded.
        lpips: the same; empty without its weights, and for pictures that are too small for it.
        gate_snr_db: smallest SNR allowed for the last state.
        pairs, histograms: the pictures that are least alike, and how large the errors of all of them are.
        tokens: where states are ids; ``states`` compares these as vectors with a one at each id's place.
    """

    reference: str
    runner: str
    run: str
    seed: int
    labels: tuple[int, ...]
    states: tuple[At, ...]
    evaluations: tuple[At, ...]
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    gate_snr_db: float
    pairs: tuple[Pair, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    lpips: tuple[float, ...] = ()
    tokens: Tokens | None = None

    @property
    def loss(self) -> Loss:
        """Of the final latents and of the pictures; of the logits where states are ids, as such runs part."""
        if self.tokens is not None:
            return Loss(self.worst_evaluation.metrics.relative_l2)
        pictures = [value for value in self.psnr_db if math.isfinite(value)]
        return Loss(latents_snr_db=self.states[-1].metrics.snr_db, psnr_db=min(pictures, default=None))

    @property
    def status(self) -> str:
        """``passed``, ``lossy`` or ``failed``; see :mod:`dexport.verdict`."""
        if self.tokens is not None:
            worst = self.worst_evaluation.metrics
            return status_of(worst.finite and worst.relative_l2 <= self.tokens.gate_l2, self.loss)
        last = self.states[-1].metrics
        return status_of(last.finite and last.snr_db >= self.gate_snr_db, self.loss)

    @property
    def passed(self) -> bool:
        """Whether it is within its gate, and what is lost is fit to ship."""
        return self.status == PASSED

    @property
    def worst_evaluation(self) -> At:
        """The evaluation that is furthest from the reference's."""
        return max(self.evaluations, key=lambda at: at.metrics.relative_l2 if at.metrics.finite else math.inf)

    @property
    def drift(self) -> str:
        """A sentence: whether the error of the states accumulates, heals or stays."""
        if self.tokens is not None:
            return _told(self.tokens, self.worst_evaluation.metrics.relative_l2, self.states)
        errors = [at.metrics.relative_l2 for at in self.states]
        if not np.isfinite(errors).all():
            return "The states are not finite."
        peak = int(np.argmax(errors))
        first, most, last = errors[0], errors[peak], errors[-1]
        if most == 0:
            return "The states are equal, bit for bit."
        at_peak = f"{most:.1e} after step {peak + 1} of {len(errors)}"
        if most > NOTABLE * last:
            end = "it heals" if last <= SHIPPABLE_L2 else "it falls, and stays too large to ship"
            return f"The error of the states peaks at {at_peak} and ends at {last:.1e}: {end}."
        if last > NOTABLE * first:
            times = f", {last / first:.1f} times as much" if first else ""
            return f"The error of the states grows from {first:.1e} after step 1 to {last:.1e}{times}: it accumulates."
        return f"The error of the states stays where it is: {first:.1e} after the first step, {last:.1e} at the end."

    def to_json(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite becomes null."""
        document = asdict(self)
        for name, errors in (("states", self.states), ("evaluations", self.evaluations)):
            document[name] = [{"t": at.t, **finite_or_null(asdict(at.metrics))} for at in errors]
        document["psnr_db"] = [value if np.isfinite(value) else None for value in self.psnr_db]
        return {"passed": self.passed, "status": self.status, "drift": self.drift, **document}


def _told(tokens: Tokens, worst: float, states: Sequence[At]) -> str:
    """A sentence on ids."""
    if not any(tokens.otherwise):
        return f"All {tokens.decided:,} ids that the steps decide are the same."
    first = next((number for number, at in enumerate(states, start=1) if at.metrics.relative_l2), None)
    apart = "The free runs end with the same ids."
    if first is not None:
        apart = f"The free runs part in step {first}, and {tokens.equal:.1%} of the ids are the same in the end."
    return (
        f"{sum(tokens.otherwise):,} of {tokens.decided:,} ids fall otherwise at PyTorch's states: their candidates lie "
        f"within the error of the logits (relative L2 {worst:.1e} at worst). {apart}"
    )


def check_trajectory(
    program: OpenProgram,
    reference: OpenProgram,
    labels: Sequence[int],
    *,
    seed: int = 0,
    gate_snr_db: float,
    gate_l2: float = math.inf,
    lpips: PictureDistance | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> TrajectoryReport:
    """Run both and compare them step by step.

    Args:
        program: a bundle's, with its settings.
        reference: the same program on PyTorch sessions.
        labels: one image each; a program without classes takes as many zeros as images.
        gate_snr_db: of the final states. Where these are ids, ``gate_l2`` takes its place, the largest error of an
            evaluation.
        lpips: measured where there are weights of it.

    Raises:
        UsageError: no images.
        GateError: a decoder's values that are not finite.
    """
    if not labels:
        raise UsageError("a trajectory needs at least one image", hint="give a label")
    request = Request(len(labels), tuple(labels) if program.classes is not None else ())
    draws = Draws(seed, images=range(len(labels)), record=True)
    watch = _Watch(reference.calls, program)
    on_progress(0, 3, "PyTorch, and the bundle at its states")
    wanted = _steps(watch.run(reference.program, request, draws))
    on_progress(1, 3, "bundle, free run")
    got = _steps(program.run(request, Replay(draws.draws)))
    tokens, are_ids = None, wanted.steps[-1].decided is not None
    if are_ids:
        on_progress(2, 3, "bundle, every step at PyTorch's state")
        tokens = _tokens(program, request, Replay(draws.draws), wanted.steps, got.steps[-1].state, gate_l2)
    ends = wanted.steps[-1].state.astype(np.float32), got.steps[-1].state.astype(np.float32)
    finite = all(np.isfinite(end).all() for end in ends)
    if finite and program.pictures:
        for side in (wanted, got):
            if side.error is not None:
                raise side.error
    pictures = (
        (wanted.steps[-1].results[PICTURES], got.steps[-1].results[PICTURES]) if finite and program.pictures else ()
    )
    if not pictures or min(pictures[0].shape[1:3]) < LPIPS_SMALLEST:
        lpips = None
    likeness = compare_pictures([pictures] if pictures else [], captions(program, labels), lpips)
    return TrajectoryReport(
        reference=reference.runner,
        runner=program.runner,
        run=program.program.title,
        seed=seed,
        labels=tuple(labels),
        states=tuple(At(a.time, compare(a.state, b.state)) for a, b in zip(wanted.steps, got.steps, strict=True)),
        evaluations=tuple(watch.evaluations),
        psnr_db=likeness.psnr_db,
        ssim=tuple(ssim(*pair) for pair in zip(*pictures, strict=True)),
        gate_snr_db=gate_snr_db,
        pairs=likeness.pairs,
        histograms=(
            *((error_histogram("final states", *ends),) if finite and not are_ids else ()),
            *((likeness.histogram,) if pictures else ()),
        ),
        lpips=() if lpips is None else tuple(map(float, lpips(*pictures))),
        tokens=tokens,
    )


def captions(program: OpenProgram, labels: Sequence[int]) -> list[str]:
    """Names of classes where there are names."""
    return [caption(program, None if program.classes is None else label) for label in labels]


@dataclass(frozen=True)
class _Run:
    """The steps of a run, and what ended it where its results are not finite."""

    steps: list[Step]
    error: GateError | None = None


def _steps(run: Iterable[Step]) -> _Run:
    steps: list[Step] = []
    try:
        for step in run:
            steps.append(step)
    except GateError as error:
        return _Run(steps, error)
    return _Run(steps)


class _Watch:
    """Evaluates the bundle at the states that the reference meets, as it meets them: outputs may be large.

    Attributes:
        evaluations: the errors of the calls that belong to steps so far.
    """

    def __init__(self, calls: Calls, program: OpenProgram) -> None:
        self.evaluations: list[At] = []
        self._found: list[tuple[float | None, Metrics]] = []
        main = next(iter(program.roles))
        self._calls: Calls = {
            role: [
                _Watched(network, other, role == main, program.program.clock, self._found)
                for network, other in zip(networks, program.calls[role], strict=True)
            ]
            for role, networks in calls.items()
        }

    def run(self, program: Program, request: Request, draws: Draws) -> Iterator[Step]:
        """The steps of the reference; a call without a time has that of its step."""
        for step in program.run(self._calls, request, draws):
            self.evaluations += [At(step.time if time is None else time, metrics) for time, metrics in self._found]
            self._found.clear()
            yield step


class _Watched:
    """A network of the reference, and that of the bundle beside it."""

    def __init__(
        self,
        network: Network,
        other: Network,
        is_main: bool,
        clock: Clock | None,
        found: list[tuple[float | None, Metrics]],
    ) -> None:
        self.graphs, self._network, self._other = network.graphs, network, other
        self._is_main, self._clock, self._found = is_main, clock, found

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        outputs = self._network(graph, **inputs)
        time = self.graphs[graph].input(TIME)
        if time is not None or self._is_main:
            name = self.graphs[graph].outputs[0].name
            at = None if time is None else float(in_unit(inputs[time.name], time.clock, self._clock).flat[0])
            self._found.append((at, compare(outputs[name], self._other(graph, **inputs)[name])))
        return outputs


def _tokens(
    program: OpenProgram, request: Request, draws: Draws, wanted: Sequence[Step], end: np.ndarray, gate_l2: float
) -> Tokens:
    """Run every step of the bundle at the state that the reference had before it."""
    run = program.run(request, draws)
    assert isinstance(run, Generator), "a program whose states are ids takes these by send"
    otherwise, before = [], None
    for step in wanted:
        found = run.send(before).state
        otherwise.append(int((found != step.state).sum()))
        before = step.state
    decided = sum(step.decided or 0 for step in wanted)
    return Tokens(decided, tuple(otherwise), float((wanted[-1].state == end).mean()), gate_l2)
