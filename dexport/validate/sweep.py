"""What a setting of a program costs and what it changes, over several of its values."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dexport.files import replacing
from dexport.limits import MOST_BATCH, check_pictures, check_whole
from dexport.optional import optional_import
from dexport.runtime.calls import last_step
from dexport.runtime.draws import Draws
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Calls, Network, Request
from dexport.validate.distances import PIXELS, Moments, PairedDelta, frechet_to, paired_delta, pooled_pixels
from dexport.validate.metrics import compare

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Point:
    """One value of the setting.

    Attributes:
        evaluations: how often each graph of each network of the main role ran for one image.
        seconds: network time per image: rows times the fastest time of one, as other work only slows one down.
        cost: ``seconds`` relative to the first point.
        relative_l2: of the images against those of the first point, which have the same draws.
        frechet: distance over pooled pixels to the reference images, minus that of the first point's images, in pairs
            of the same draws; None without reference images.
    """

    value: Any
    evaluations: tuple[Mapping[str, int], ...]
    seconds: float
    cost: float
    relative_l2: float
    frechet: PairedDelta | None


@dataclass(frozen=True)
class Sweep:
    """All points of one sweep, and what they have in common; ``over`` is the setting and ``run`` the others."""

    bundle: str
    runner: str
    over: str
    run: str
    seed: int
    images: int
    reference_images: int
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def sweep(
    program: OpenProgram,
    over: str,
    points: Mapping[Any, Mapping[str, Any]],
    *,
    count: int = 1,
    seed: int = 0,
    batch: int = 8,
    reference: np.ndarray | None = None,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Sweep:
    """Make ``count`` images of every class, or ``count`` without classes, at every point, with the same draws.

    Args:
        program: with the settings that do not change.
        over: what changes, in words.
        points: settings of the program by the value that stands for them; the first is the comparison.
        reference: real images (N, H, W, C) uint8 for the distance; without, only the paired error is reported.

    Raises:
        UsageError: settings that the program does not have, or a program that makes no pictures.
    """
    check_pictures(program.classes or 1, count)
    check_whole("--batch", batch, MOST_BATCH, 1)
    program.check_pictures()
    chosen = {value: program.with_settings(**settings) for value, settings in points.items()}
    labels: list[int] = np.repeat(np.arange(program.classes or 1), count).tolist()
    real = None if reference is None else Moments.of(pooled_pixels(reference))
    total = len(chosen) * len(labels)
    batch = min(batch, program.largest_batch() or batch)
    watch = Watch(program.calls)
    runs: list[tuple[np.ndarray, Usage]] = []
    for value, each in chosen.items():
        watch.usage, parts = defaultdict(int), []
        for start in range(0, len(labels), batch):
            on_progress(len(runs) * len(labels) + start, total, f"{over} {value}")
            some = labels[start : start + batch]
            request = Request(len(some), tuple(some) if program.classes is not None else ())
            draws = Draws(seed, images=range(start, start + len(some)))
            parts.append(last_step(each.program.run(watch.calls, request, draws)).results[PICTURES])
        runs.append((np.concatenate(parts), watch.usage))
    costs = [sum(rows * watch.fastest[key] for key, rows in usage.items()) / len(labels) for _, usage in runs]
    features = [pooled_pixels(images) for images, _ in runs] if real is not None else []
    main, networks = next(iter(program.roles.items()))
    points_found = tuple(
        Point(
            value=value,
            evaluations=tuple(_evaluations(each, main, index) for index in range(len(networks))),
            seconds=cost,
            cost=cost / costs[0],
            relative_l2=compare(runs[0][0], images).relative_l2,
            frechet=None if real is None else paired_delta(features[number], features[0], real, frechet_to),
        )
        for number, ((value, each), (images, _), cost) in enumerate(zip(chosen.items(), runs, costs, strict=True))
    )
    return Sweep(
        bundle=program.bundle.manifest["name"],
        runner=program.runner,
        over=over,
        run=program.program.title,
        seed=seed,
        images=len(labels),
        reference_images=0 if reference is None else len(reference),
        points=points_found,
    )


def _evaluations(program: OpenProgram, role: str, index: int) -> dict[str, int]:
    """How often each graph of a network runs for one image."""
    return dict(Counter(call.graph for call in program.rehearse() if (call.role, call.index) == (role, index)))


Key = tuple[str, int, str]
"""Role, number of the network, graph."""
Usage = dict[Key, int]
"""Rows that a graph evaluated."""


class Watch:
    """Times every evaluation of networks, per row.

    Attributes:
        calls: the networks to run a program with.
        usage: rows of each graph since it was last set.
        fastest: seconds of one row of each graph.
    """

    def __init__(self, calls: Calls) -> None:
        self.usage: Usage = defaultdict(int)
        self.fastest: dict[Key, float] = {}
        self.calls: Calls = {
            role: [_Timed(network, (role, index), self) for index, network in enumerate(networks)]
            for role, networks in calls.items()
        }


class _Timed:
    def __init__(self, network: Network, place: tuple[str, int], watch: Watch) -> None:
        self.graphs = network.graphs
        self._network, self._place, self._watch = network, place, watch

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        rows = max((len(array) for array in inputs.values() if np.ndim(array)), default=1)
        started = time.perf_counter()
        outputs = self._network(graph, **inputs)
        seconds, key = (time.perf_counter() - started) / rows, (*self._place, graph)
        self._watch.usage[key] += rows
        self._watch.fastest[key] = min(seconds, self._watch.fastest.get(key, seconds))
        return outputs


def label_of(value: Any) -> str:
    """A value in tables and plots."""
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def plot(result: Sweep, path: Path) -> None:
    """Cost and distances over the values, as a PNG file."""
    optional_import("matplotlib").use("Agg")
    pyplot = optional_import("matplotlib.pyplot")
    numbers = all(isinstance(point.value, (int, float)) for point in result.points)
    values = [point.value if numbers else label_of(point.value) for point in result.points]
    with_reference = result.reference_images > 0
    figure, axes = pyplot.subplots(1, 3 if with_reference else 2, figsize=(4 * (3 if with_reference else 2), 3.2))
    first = f"{result.over} {label_of(result.points[0].value)}"
    curves = [(f"cost relative to {first}", [point.cost for point in result.points])]
    curves.append((f"relative L2 to {first}, same draws", [point.relative_l2 for point in result.points]))
    for axis, (title, curve) in zip(axes[:2], curves, strict=True):
        axis.plot(values, curve, marker="o")
        axis.set(title=title, xlabel=result.over, ylim=(0, None))
    deltas = [point.frechet for point in result.points if point.frechet is not None]
    if deltas:
        intervals = [[each.delta - each.low for each in deltas], [each.high - each.delta for each in deltas]]
        axes[2].errorbar(values, [each.delta for each in deltas], intervals, marker="o", capsize=3)
        title = f"{PIXELS},\ndifference to {first}, {deltas[0].confidence:.0%} interval"
        axes[2].set(title=title, xlabel=result.over)
    for axis in axes:
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{result.bundle}: {result.run}", fontsize=10)
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
