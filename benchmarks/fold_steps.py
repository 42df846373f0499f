"""What ``dexport build --fold-steps`` changes on this CPU: ``python3 -m benchmarks.fold_steps``.

For every recipe, with random weights: nodes, operators that are left out, bytes of the file and of the tables, peak
memory of the export, and the time of an evaluation with and without, which take turns. Times are of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import dexport
from benchmarks.quantize import machine
from dexport.bundle import Bundle, load_bundle
from dexport.runtime.inputs import port_of
from dexport.runtime.session import OnnxSession
from dexport.validate.bench.bench import example
from dexport.validate.bench.timing import Times, take_turns

RECIPES = ("dimr-xl-2r", "dit-s-2", "dico-s")
RESULTS = Path(__file__).parent / "results" / "fold-steps.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("steps", "batch", "rounds", "precision")}
    document: dict[str, Any] = {"machine": machine(), "settings": settings, "recipes": {}}
    if arguments.output.exists() and json.loads(arguments.output.read_text())["settings"] == settings:
        document["recipes"] = json.loads(arguments.output.read_text())["recipes"]
    for recipe in arguments.recipes:
        entry = document["recipes"][recipe] = measure(recipe, arguments)
        print(table(recipe, entry), flush=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both bundles of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for name, steps in (("any time", None), ("folded", arguments.steps)):
            path = Path(folder) / name
            options = {"precision": arguments.precision, "parity": False, "cache": False}
            dexport.build(recipe, path, fold_steps=steps, **options)
            bundles[name] = load_bundle(path)
        load = os.getloadavg()[0]
        times = timed(bundles, arguments.batch, arguments.rounds)
        before, after = (bundle.network.entry()["ops"]["final"] for bundle in bundles.values())
    fewer = {op: count - after.get(op, 0) for op, count in before.items() if count > after.get(op, 0)}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "load": load,
        "time tables": bundles["folded"].network.manifest["sizes"]["time_tables"],
        "fewer operators": fewer,
        **{name: figures(bundle, times[name]) for name, bundle in bundles.items()},
    }


def timed(bundles: dict[str, Bundle], batch: int, rounds: int) -> dict[str, Times]:
    network = next(iter(bundles.values())).network
    inputs = example(map(port_of, network.graphs[network.main_graph].inputs), batch)
    sessions = {name: OnnxSession(bundle.network.model_path(), threads=1) for name, bundle in bundles.items()}
    return take_turns({name: partial(session, **inputs) for name, session in sessions.items()}, rounds)


def figures(bundle: Bundle, times: Times) -> dict[str, Any]:
    network = bundle.network
    return {
        "nodes": sum(network.entry()["ops"]["final"].values()),
        "onnx bytes": network.manifest["sizes"]["onnx"],
        "peak rss of the export": network.manifest["sizes"]["peak_rss"],
        "cpu s": round(times.median_cpu, 4),
        "wall s": round(times.median, 4),
        "fastest s": round(times.fastest, 4),
    }


def table(recipe: str, entry: dict[str, Any]) -> str:
    lines = [f"{recipe}, load {entry['load']:.1f}, tables {entry['time tables']}"]
    for name in ("any time", "folded"):
        row = entry[name]
        lines.append(
            f"  {name:10} {row['nodes']:6} nodes {row['onnx bytes'] / 1e6:9.1f} MB "
            f"{row['cpu s'] * 1e3:9.1f} ms cpu {row['wall s'] * 1e3:9.1f} ms wall, "
            f"{row['fastest s'] * 1e3:.1f} ms fastest"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
