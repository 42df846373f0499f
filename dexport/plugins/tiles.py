"""Block sizes per kernel and GPU generation, from each op's ``tiles.toml``."""

from __future__ import annotations

import tomllib
from importlib import resources

from dexport.plugins.op import DType, Kernel, Tile

OPTIONS = ("warps", "stages")


def candidates(kernel: Kernel, target: str, dtype: DType) -> tuple[Tile, ...]:
    """The tiles worth trying, the preferred one first.

    A row list named after the type (``float32``) goes before one named after the target (``sm90``), then
    ``default``.
    """
    package = kernel.module.rpartition(".")[0]
    table = tomllib.loads((resources.files(package) / "tiles.toml").read_text(encoding="utf-8"))[kernel.name]
    rows = next(table[key] for key in (dtype, target, "default") if key in table)
    return tuple(_tile(row) for row in rows)


def preferred(kernel: Kernel, target: str, dtype: DType) -> Tile:
    """The tile that is used."""
    return candidates(kernel, target, dtype)[0]


def _tile(row: dict[str, int]) -> Tile:
    blocks = {name: size for name, size in row.items() if name not in OPTIONS}
    return Tile(blocks, warps=row["warps"], stages=row["stages"])
