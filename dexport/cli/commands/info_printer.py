"""What ``dexport info`` shows of a bundle or an archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dexport.bundle import Bundle, reading_manifest
from dexport.cli.facts import engine_line, layers_line, lost_line, sampling_line, signature, times_line
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
    if bundle.stitch:
        _print_stitched(bundle)
        return
    named = f": {m['recipe']['family']} {m['name']}, "
    out.print(Text.assemble((str(bundle.source), "bold"), named, colored(m["status"]), ", hashes verified"))
    precision = m["precision"]
    kinds: dict[str, int] = {}
    for dtype in precision["nodes"].values():
        kinds[dtype] = kinds.get(dtype, 0) + 1
    engine = m["engine"]
    print_lines(
        {
            "weights": "RANDOM, not a trained model" if m["weights"]["random"] else m["weights"]["path"],
            "inputs": signature(m["io"]["inputs"]),
            "outputs": signature(m["io"]["outputs"]),
            "batch": "{min} to {max}, tuned for {opt}".format(**m["batch"]),
            "precision": f"{precision['name']} ({', '.join(f'{n} nodes {d}' for d, n in kinds.items())})",
            "layers": layers_line(precision),
            "guidance": m["guidance"],
            "sampling": sampling_line(m.get("sampling")),
            "times": times_line(m),
            "parts": ", ".join(m.get("parts", ())) or "none",
            "custom ops": ", ".join(map(_custom_op, m["custom_ops"])) or "none",
            "engine": engine_line(engine) if engine else "none",
            "lost": lost_line(bundle) or "not measured",
            "validation": _validation_line(m.get("validation")),
            "built with": f"dexport {m['dexport']}, opset {m['opset']}",
        }
    )
    _print_files(m["files"])


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


def _print_stitched(bundle: Bundle) -> None:
    m = bundle.manifest
    named = (str(bundle.source), "bold"), f": {m['name']}, "
    out.print(Text.assemble(*named, colored(m["status"]), ", hashes verified"))
    if lost := lost_line(bundle):
        out.print(Text("  ") + lost, soft_wrap=True)
    print_lines({f"{fraction:.0%}": str(part.path) for part, fraction in bundle.stitch})
    for part, _ in bundle.stitch:
        _print_bundle(part)


def _validation_line(record: Mapping[str, Any] | None) -> Text:
    if not record:
        return Text("none recorded; run `dexport validate`")
    levels = ", ".join(record["settings"]["levels"])
    lost = str(Loss.of_json(record.get("loss")))
    return colored(record["verdict"]) + f" on {record['date'][:10]} ({levels}){lost and f': {lost}'}"


def _custom_op(op: Mapping[str, Any]) -> str:
    kernels = f"plugin, {len(op['ptx_sha256'])} kernels" if op["ptx_sha256"] else "function body"
    return f"{op['name']} v{op['version']} ({op['nodes']} nodes, {kernels})"
