"""Half-sentences about what a manifest records, which several commands print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from dexport.bundle import Bundle
from dexport.cli.terminal import MB
from dexport.verdict import LOSSY, lossy_text

MOST_VALUES = 4
"""Of a list that is spelled out."""


def engine_line(engine: Mapping[str, Any]) -> Text:
    return Text.assemble(
        f"{engine['flavour']} {engine['version']} for {', '.join(engine['targets'])}, "
        f"{engine['plan_bytes'] / MB:,.1f} MB, types of {engine['checked_nodes']} nodes asserted; ",
        ("built, not executed", "yellow"),
        f" ({engine['reason']})",
    )


def layers_line(precision: Mapping[str, Any]) -> str:
    """How many layers have which scheme, and what a budget came to."""
    counts: dict[str, int] = {}
    for scheme in precision.get("layers", {}).values():
        counts[scheme] = counts.get(scheme, 0) + 1
    line = ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items())) or "not quantised"
    budget = precision.get("budget")
    if budget:
        snr = "exact" if budget["snr_db"] is None else f"{budget['snr_db']:.1f} dB after {budget['steps']} steps"
        share = budget["bytes"] / budget["float_bytes"]
        line += f"; budget {budget['asked']}: {snr}, {budget['bytes'] / MB:.2f} MB, {share:.2f} of the float file"
    return line


def lost_line(bundle: Bundle) -> Text:
    """What a build cost, as parity measured it; nobody should have to look it up. Empty where nothing was measured."""
    if bundle.status == LOSSY:
        accepted = "accepted" if bundle.acceptable else "not accepted"
        return Text.assemble(("LOSSY", "yellow"), f", {accepted}: {lossy_text(bundle.loss)}")
    return Text(str(bundle.loss))


def program_line(facts: Mapping[str, Any] | None) -> str:
    """A program's kind and facts, those that are set."""
    if facts is None:
        return "none"
    return ", ".join([str(facts["kind"]), *_facts("", {name: v for name, v in facts.items() if name != "kind"})])


def _facts(prefix: str, facts: Mapping[str, Any]) -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _facts(f"{prefix}{name}.", value)
        elif isinstance(value, (list, tuple)):
            if value:
                yield f"{prefix}{name} {len(value)} values" if len(value) > MOST_VALUES else f"{prefix}{name} {value}"
        elif value not in (None, ""):
            yield f"{prefix}{name} {value:g}" if isinstance(value, float) else f"{prefix}{name} {value}"


def times_line(network: Mapping[str, Any]) -> str:
    """The times that a network's graphs take."""
    tables = network["sizes"]["time_tables"]
    if tables is None:
        return "any"
    return (
        f"those of {network['folded']} steps: {tables['tables']} tables, "
        f"{tables['bytes'] / MB:.2f} MB in place of {tables['weight_bytes'] / MB:.2f} MB of weights and "
        f"{tables['nodes']} nodes"
    )


def signature(specs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{s['name']} ({','.join(map(str, s['shape']))}) {s['dtype']}" for s in specs)
