"""What ``dexport info`` shows of a bundle or an archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dexport.bundle import Bundle, Network, graph_file, reading_manifest
from dexport.cli.facts import engine_line, layers_line, lost_line, program_line, signature, times_line
from dexport.cli.terminal import colored, out, print_lines
from dexport.verdict import Loss

if TYPE_CHECKING:
    from dexport.archive import Archive


def print_bundle(bundle: Bundle) -> None:
    """A bundle's manifest in short. Its hashes have been checked.

    Raises:
        InputError: the manifest lacks something.
    """
    with reading_manifest(bundle):
        _print_bundle(bundle)


def _print_bundle(bundle: Bundle) -> None:
    m = bundle.manifest
    out.print(
        Text.assemble((str(bundle.source), "bold"), f": {m['name']}, ", colored(m["status"]), ", hashes verified")
    )
    print_lines(
        {
            "program": program_line(m["program"]),
            "lost": lost_line(bundle) or "not measured",
            "validation": _validation_line(m.get("validation")),
            "built with": f"dexport {m['dexport']}",
        }
    )
    for number, network in enumerate(bundle.networks.values(), start=1):
        _print_network(network, last=number == len(bundle.networks))
    _print_files(m["files"])


def _print_network(network: Network, last: bool) -> None:
    """A branch of the tree of roles, networks and graphs."""
    m = network.manifest
    precision = m["precision"]
    folder = f" ({network.folder}/)" if network.folder else ""
    named = f": {m['recipe']['family']} {m['name']}{folder}, "
    out.print(Text.assemble("└─ " if last else "├─ ", (network.name, "bold"), named, colored(m["status"])))
    stem = "   " if last else "│  "
    lines = {
        "weights": "RANDOM, not a trained model" if m["weights"]["random"] else m["weights"]["path"],
        "batch": "{min} to {max}, tuned for {opt}".format(**m["batch"]),
        "precision": precision["name"],
        "layers": layers_line(precision),
        "times": times_line(m),
        "opset": str(m["opset"]),
    }
    print_lines(lines, stem)
    for number, name in enumerate(network.graphs, start=1):
        end = number == len(network.graphs)
        out.print(Text.assemble(stem, "└─ " if end else "├─ ", (name, "bold"), f": {graph_file(name)}"))
        _print_graph(network.entry(name), stem + ("   " if end else "│  "))


def _print_graph(graph: Mapping[str, Any], stem: str) -> None:
    kinds: dict[str, int] = {}
    for dtype in graph["nodes"].values():
        kinds[dtype] = kinds.get(dtype, 0) + 1
    engine = graph["engine"]
    print_lines(
        {
            "inputs": signature(graph["inputs"]),
            "outputs": signature(graph["outputs"]),
            "computes in": ", ".join(f"{n} nodes {d}" for d, n in kinds.items()),
            "custom ops": ", ".join(map(_custom_op, graph["custom_ops"])) or "none",
            "engine": engine_line(engine) if engine else "none",
        },
        stem,
    )


def print_archive(archive: Archive, verified: bool) -> None:
    """What is in an archive of which every byte has been checked; ``verified``: the signature as well."""
    out.print(Text.assemble((str(archive.path), "bold"), f": archive, {archive.bytes:,} bytes, hashes verified"))
    m = archive.manifest
    key = "none" if archive.key is None else f"by {archive.key}{'' if verified else ', not verified'}"
    lines = {"bundle": m.get("name"), "status": m.get("status"), "lost": Loss.of_json(m.get("loss"))}
    lines["built with"] = f"dexport {m.get('dexport')}"
    print_lines({**{name: str(text) for name, text in lines.items()}, "signature": key})
    _print_files(m["files"])


def _print_files(files: Mapping[str, Any]) -> None:
    table = Table("file", "bytes", "sha256")
    for name, entry in files.items():
        table.add_row(name, f"{entry['size']:,}", entry["sha256"][:16])
    out.print(table)


def _validation_line(record: Mapping[str, Any] | None) -> Text:
    if not record:
        return Text("none recorded; run `dexport validate`")
    levels = ", ".join(record["settings"]["levels"])
    lost = str(Loss.of_json(record.get("loss")))
    return colored(record["verdict"]) + f" on {record['date'][:10]} ({levels}){lost and f': {lost}'}"


def _custom_op(op: Mapping[str, Any]) -> str:
    kernels = f"plugin, {len(op['ptx_sha256'])} kernels" if op["ptx_sha256"] else "function body"
    return f"{op['name']} v{op['version']} ({op['nodes']} nodes, {kernels})"
