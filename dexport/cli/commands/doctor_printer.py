"""What ``dexport doctor`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from dexport.cli.terminal import GB, out, print_lines


def print_machine(machine: Mapping[str, Any]) -> None:
    """What ``dexport doctor`` shows."""
    print_lines(
        {
            "python": machine["python"],
            "system": machine["os"],
            "cpu": f"{machine['cpu_count']} cores",
            "memory": f"{machine['ram_available_bytes'] / GB:.1f} of {machine['ram_bytes'] / GB:.1f} GB free",
            "disk": f"{machine['disk_free_bytes'] / GB:.1f} GB free here",
            "gpu": ", ".join(f"{gpu['name']} ({gpu['target']})" for gpu in machine["gpus"]) or "none",
        }
    )
    packages = Table("package", "version", "install with")
    for name, entry in machine["packages"].items():
        packages.add_row(name, entry["version"] or "-", entry["fix"] or "")
    out.print(packages)
    abilities = Table("can", "", "why", "fix")
    for name, ability in machine["can"].items():
        abilities.add_row(
            name,
            Text("yes", "green") if ability["ok"] else Text("no", "red"),
            ability["why"],
            ability["fix"],
        )
    out.print(abilities)
