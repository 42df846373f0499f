"""What ``dexport recipes`` shows, and ``dexport info`` of a recipe."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dexport.cli.facts import program_line, signature
from dexport.cli.terminal import out, print_lines


def print_recipes(described: Sequence[Mapping[str, Any]]) -> None:
    """One line per variant."""
    table = Table("name", "system", "parameters", "input", "official weights")
    for recipe in described:
        if "roles" in recipe:
            networks = [name for names in recipe["roles"].values() for name in names]
            shape, weights = "system", f"of {', '.join(networks)}"
        else:
            shape = "x".join(str(dim) for dim in recipe["inputs"][0]["shape"])
            weights = ", ".join(recipe["checkpoint"]["files"])
        table.add_row(recipe["name"], recipe["family"], f"{recipe['parameters']:,}", shape, weights)
    out.print(table)


def print_recipe(recipe: Mapping[str, Any]) -> None:
    """Everything about one recipe."""
    out.print(Text.assemble((recipe["name"], "bold"), f": {recipe['summary']} ({recipe['source']})"))
    lines = {
        "parameters": f"{recipe['parameters']:,}",
        "inputs": signature(recipe["inputs"]),
        "outputs": signature(recipe["outputs"]),
        "settings": ", ".join(f"{key}={value}" for key, value in recipe["settings"].items()),
        "weights": ", ".join(recipe["checkpoint"]["files"]) or "none published",
        "from": recipe["checkpoint"]["from"] or "-",
        "formats": ", ".join(recipe["checkpoint"]["formats"]),
        "containers": ", ".join(recipe["checkpoint"]["containers"]),
        "custom ops": ", ".join(recipe["custom_ops"]) or "none",
        "fp32 islands": ", ".join(itertools.chain(*recipe["islands"].values())),
        "gates": ", ".join(f"{p} {gate:g}" for p, gate in recipe["gates_relative_l2"].items()) + " (relative L2)",
        "graphs": ", ".join(recipe["graphs"]),
        "program": program_line(recipe["program"]),
    }
    print_lines(lines)


def print_system(system: Mapping[str, Any]) -> None:
    """Who plays which role."""
    out.print(Text.assemble((system["name"], "bold"), f": {system['summary']} ({system['source']})"))
    roles = {role: ", ".join(recipes) for role, recipes in system["roles"].items()}
    print_lines({"parameters": f"{system['parameters']:,}", **roles, "program": program_line(system["program"])})
