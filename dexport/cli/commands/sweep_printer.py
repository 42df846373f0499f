"""The table of ``dexport sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dexport.cli.terminal import out

if TYPE_CHECKING:
    from dexport.validate.sweep import Sweep


def print_sweep(result: Sweep, path: Path) -> None:
    """The table of ``dexport sweep``."""
    from dexport.validate.distances import PIXELS

    title = f"{result.bundle}: {result.images} images, {result.run}"
    columns = [result.over, "evaluations", "ms per image", "cost", f"relative L2 to {result.points[0].value}"]
    table = Table(
        *columns, *[f"{PIXELS} to {result.reference_images} images"] * (result.reference_images > 0), title=title
    )
    for point in result.points:
        row = [
            f"{point.value:g}" if isinstance(point.value, float) else str(point.value),
            "+".join(map(str, point.evaluations)),
            f"{point.seconds * 1000:.1f}",
        ]
        row += [f"{point.cost:.2f}x", f"{point.relative_l2:.4f}"]
        table.add_row(*row, *([] if point.frechet is None else [f"{point.frechet:.4f}"]))
    out.print(table)
    out.print(f"{result.runner}; the time is that of the networks\n  {path}\n  {path.with_suffix('.png')}")
