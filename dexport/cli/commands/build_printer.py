"""What ``dexport build`` and ``dexport quantize`` made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dexport.bundle import ENGINES, MODEL, PARTS, REPORTS
from dexport.cli.commands.compare_printer import print_parity
from dexport.cli.facts import engine_line, layers_line, lost_line, times_line
from dexport.cli.terminal import colored, out
from dexport.verdict import NOT_VERIFIED

if TYPE_CHECKING:
    from dexport.exporter.build import BuildResult


def print_result(result: BuildResult) -> None:
    """What a build made: the parity table, the engine, and the paths to look at."""
    manifest, path = result.bundle.manifest, result.bundle.path
    if manifest["weights"]["random"]:
        seed = manifest["weights"]["seed"]  # None for several denoisers with different ones
        about = f"{'' if seed is None else f' (seed {seed})'}: this is not a trained model"
        out.print(Text.assemble(("RANDOM weights", "yellow"), about))
    for part, bundle in {"": result.bundle, **result.bundle.parts}.items():
        _print_ranges(part, bundle.manifest.get("precision", {}).get("ranges"))
    for part, verdict in {"": result.verdict, **result.parts}.items():
        if verdict is not None:
            print_parity(verdict, part)  # type: ignore[arg-type]
    if manifest["status"] == NOT_VERIFIED:
        out.print(Text.assemble("parity: ", ("not run", "yellow"), " (--no-parity)"))
    if any(scheme != "float" for scheme in manifest.get("precision", {}).get("layers", {}).values()):
        out.print(f"layers: {layers_line(manifest['precision'])}")
    if "sizes" in manifest and manifest["sizes"]["time_tables"] is not None:
        out.print(f"times: {times_line(manifest)}")
    for name, bundle in {"": result.bundle, **result.bundle.parts}.items():
        if bundle.manifest.get("engine"):
            out.print(Text(f"engine{name and f' of {name}'}: ") + engine_line(bundle.manifest["engine"]))
    if lost := lost_line(result.bundle):
        out.print(Text("lost: ") + lost, soft_wrap=True)
    out.print(Text.assemble(f"bundle: {path} (", colored(manifest["status"]), ")"))
    for name in (MODEL, ENGINES, REPORTS, PARTS):
        if (path / name).exists():
            out.print(f"  {path / name}")


def _print_ranges(part: str, ranges: Mapping[str, Any] | None) -> None:
    """What ``--precision auto`` kept in float32, and why."""
    if ranges is None:
        return
    of = part and f" of {part}"
    if not ranges["kept"]:
        out.print(f"precision{of}: float16 holds everything ({ranges['inputs']})")
        return
    table = Table("kept in float32", "largest", "subnormal", "why", title=f"precision{of}: {ranges['inputs']}")
    for path, seen in ranges["kept"].items():
        why = "; ".join(f"{reason} {figure:.2g}" for reason, figure in seen["reasons"].items())
        table.add_row(path or "outside of modules", f"{seen['largest']:.4g}", f"{seen['subnormal']:.0%}", why)
    out.print(table)
