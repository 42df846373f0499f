"""What ``dexport build`` and ``dexport quantize`` made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dexport.bundle import ENGINES, NETWORKS, REPORTS, graph_file
from dexport.cli.commands.compare_printer import print_parity
from dexport.cli.facts import engine_line, layers_line, lost_line, times_line
from dexport.cli.terminal import colored, out
from dexport.verdict import NOT_VERIFIED

if TYPE_CHECKING:
    from dexport.exporter.build import BuildResult


def print_result(result: BuildResult) -> None:
    """What a build made: the parity tables, the engines, and the paths to look at."""
    bundle = result.bundle
    several = len(bundle.networks) > 1
    for network in bundle.networks.values():
        m, name = network.manifest, network.name if several else ""
        if m["weights"]["random"]:
            about = f"{of(name)} (seed {m['weights']['seed']}): this is not a trained model"
            out.print(Text.assemble(("RANDOM weights", "yellow"), about))
    for network in bundle.networks.values():
        m, name = network.manifest, network.name if several else ""
        _print_ranges(name, m["precision"]["ranges"])
        for graph, verdict in result.verdicts.get(network.name, {}).items():
            title = " ".join(filter(None, (name, graph if len(network.graphs) > 1 else "")))
            print_parity(verdict, title)  # type: ignore[arg-type]
        if m["status"] == NOT_VERIFIED:
            out.print(Text.assemble(f"parity{of(name)}: ", ("not run", "yellow"), " (--no-parity)"))
        if any(scheme != "float" for scheme in m["precision"]["layers"].values()):
            out.print(f"layers{of(name)}: {layers_line(m['precision'])}")
        if m["sizes"]["time_tables"] is not None:
            out.print(f"times{of(name)}: {times_line(m)}")
        for graph in network.graphs:
            if engine := network.entry(graph)["engine"]:
                title = " ".join(filter(None, (name, graph if len(network.graphs) > 1 else "")))
                out.print(Text(f"engine{of(title)}: ") + engine_line(engine))
    if lost := lost_line(bundle):
        out.print(Text("lost: ") + lost, soft_wrap=True)
    out.print(Text.assemble(f"bundle: {bundle.path} (", colored(bundle.status), ")"))
    graphs = [graph_file(graph) for graph in bundle.network.graphs]
    for file in (*graphs, ENGINES, REPORTS, NETWORKS):
        if (bundle.path / file).exists():
            out.print(f"  {bundle.path / file}")


def of(name: str) -> str:
    """What tells one network or graph from others; nothing where there is one."""
    return f" of {name}" if name else ""


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
