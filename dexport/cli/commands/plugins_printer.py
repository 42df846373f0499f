"""What ``dexport plugins compile`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dexport.cli.terminal import out


def print_kernels(summaries: Sequence[Mapping[str, Any]]) -> None:
    """What ``dexport plugins compile`` shows."""
    table = Table("kernel", "target", "type", "sizes", "registers", "shared", "spills", "PTX sha256")
    for kernel in summaries:
        sizes = " ".join(f"{name}={size}" for name, size in kernel["dims"].items() if name != "B")
        numbers = (str(kernel[name]) for name in ("registers", "shared_bytes", "spill_bytes"))
        table.add_row(kernel["kernel"], kernel["target"], kernel["dtype"], sizes, *numbers, kernel["ptx_sha256"][:16])
    out.print(table)
