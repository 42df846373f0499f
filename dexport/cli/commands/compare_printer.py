"""The table of forward parity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dexport.cli.terminal import colored, out
from dexport.verdict import LOSSY

if TYPE_CHECKING:
    from dexport.validate.levels.forward import ParityReport


def print_parity(report: ParityReport, part: str = "") -> None:
    """The table of checks."""
    from dexport.validate.report.parity_table import COLUMNS, lost, rows

    table = Table(*COLUMNS, title=f"{part and f'{part}: '}{report.precision} against {report.reference}")
    for row in rows(report):
        table.add_row(*row[:-1], colored(row[-1]))
    out.print(table)
    if report.status == LOSSY:
        out.print(Text.assemble(("LOSSY", "yellow"), f": {lost(report)}"), soft_wrap=True)
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}")
