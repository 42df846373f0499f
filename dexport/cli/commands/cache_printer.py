"""What ``dexport cache ls`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dexport.cli.terminal import out

if TYPE_CHECKING:
    from dexport.exporter.cache import Kept


def print_cache(folder: Path, limit: int, entries: Sequence[Kept]) -> None:
    """One line per entry, and the total."""
    table = Table("step", "size", "last used", "key")
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.label, f"{entry.size / 1e6:.1f} MB", used, entry.key[:12])
    out.print(table)
    total = sum(entry.size for entry in entries)
    out.print(f"{folder}: {total / 1e9:.2f} of {limit / 1e9:.0f} GB", soft_wrap=True)
