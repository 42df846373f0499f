"""The table of ``dexport sweep``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dexport.cli.terminal import out

if TYPE_CHECKING:
    from dexport.validate.sweep import Sweep


def print_sweep(result: Sweep, path: Path) -> None:
    """The table of ``dexport sweep``."""
    from dexport.validate.distances import PIXELS
    from dexport.validate.sweep import label_of

    first = label_of(result.points[0].value)
    columns = [result.over, "evaluations", "images/s", "cost", f"relative L2 to {first}"]
    if result.reference_images:
        columns += ["distance", "difference"]
    table = Table(*columns, title=f"{result.bundle}: {result.images} images, {result.run}")
    for point in result.points:
        row = [
            label_of(point.value),
            " + ".join(map(_counted, point.evaluations)),
            f"{1 / point.seconds:.2f}" if point.seconds else "",
            f"{point.cost:.2f}x",
            f"{point.relative_l2:.4f}",
        ]
        if point.frechet is not None:
            d = point.frechet
            row += [f"{d.a:.4f}", f"{d.delta:+.4f} ({d.low:+.4f} to {d.high:+.4f})"]
        table.add_row(*row)
    out.print(table)
    if result.points[0].frechet is not None:
        confidence = result.points[0].frechet.confidence
        out.print(f"distance: {PIXELS} to {result.reference_images} images")
        out.print(f"difference: to {first}, in pairs of the same draws, with its {confidence:.0%} interval")
    out.print(f"{result.runner}; the time is that of the networks\n  {path}\n  {path.with_suffix('.png')}")


def _counted(evaluations: Mapping[str, int]) -> str:
    """Of one network: by graph, where there are several."""
    if len(evaluations) < 2:
        return str(sum(evaluations.values()))
    return ", ".join(f"{count} {graph}" for graph, count in evaluations.items())
