"""What quantisation costs and saves on this CPU: ``python3 -m benchmarks.quantize``.

For every model and scheme: size of the file, latency against float32 in ONNX Runtime, relative L2 of the predictions on
the float32 model's own trajectory, and SNR of the states of a trajectory of its own from the same noise, whose seed no
calibration has seen. By default of the small trained models; ``--full`` is of the published sizes with random weights,
whose trajectories mean nothing: only size and latency are measured, and no budget can be met.

Latency is processor time of one thread: the median over rounds in which float32 and the scheme take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import dexport
from dexport.bundle import load_bundle
from dexport.runtime.calls import Recorder, dims, example_request
from dexport.runtime.draws import Draws
from dexport.runtime.int8_products import is_exact, multiply_exactly
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import Calls, Request
from dexport.validate.metrics import compare

BUDGETED = "snr>=25"
SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8 weight": {"int8": "weight"},
    "w8a8": {"int8": "w8a8"},
    "int4": {"precision_map": {"*": "int4"}},
    "ternary": {"ternary": True},
    BUDGETED: {"budget": BUDGETED},
}
CALIBRATED = ("w8a8", "int4", "ternary", BUDGETED)
DENSE = ("fp32", "fp16", "int8 weight", "w8a8", "int4")
"""Schemes for which TerDiT's layers, which are ternary by construction, are stored as those of any other model."""
SMALL = [f"{name}=checkpoints/{name}.safetensors" for name in ("dit-fashion", "dico-fashion", "terdit-fashion")]
FULL = ["dit-xl-2", "dico-xl", "terdit-600m"]
STEPS = 20
IMAGES = 4
BATCH = 2
"""One image with guidance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="RECIPE[=CHECKPOINT]", help="default: the small trained ones")
    parser.add_argument("--full", action="store_true", help="the published sizes, with random weights")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--work", type=Path, default=Path("out/quantize"), help="folder for the bundles, used again")
    parser.add_argument("--calibration-images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantize.json"))
    arguments = parser.parse_args()
    models = arguments.models or (FULL if arguments.full else SMALL)
    document = {"machine": machine(), "models": []}
    if arguments.output.exists():
        measured = {model.partition("=")[0] for model in models}
        before = json.loads(arguments.output.read_text())["models"]
        document["models"] = [entry for entry in before if entry["recipe"] not in measured]
    for model in models:
        recipe, _, checkpoint = model.partition("=")
        schemes = dict.fromkeys(["fp32", *(name for name in arguments.schemes if checkpoint or name != BUDGETED)])
        bundles = {name: build(arguments, recipe, checkpoint, name) for name in schemes}
        entry = measure(recipe, checkpoint, bundles, arguments.rounds)
        document["models"].append(entry)
        print(table(entry))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def build(arguments: argparse.Namespace, recipe: str, checkpoint: str, scheme: str) -> Path:
    """The bundle of one scheme; one that is there already is taken."""
    path = arguments.work / f"{recipe}-{''.join(c if c.isalnum() else '-' for c in scheme)}"
    if path.exists():
        return path
    options = dict(SCHEMES[scheme])
    exact = recipe.startswith("terdit") and scheme not in DENSE
    if scheme in CALIBRATED and not (exact and scheme == "ternary"):
        options["calibration_images"] = arguments.calibration_images
    if recipe.startswith("terdit"):
        options["ternary"] = None if exact else False
    print(f"building {path}", flush=True)
    dexport.build(recipe, path, checkpoint=checkpoint or None, parity=False, profile="latency", **options)
    return path


def measure(recipe: str, checkpoint: str, bundles: dict[str, Path], rounds: int) -> dict[str, Any]:
    """All figures of one model."""
    rows = {name: {"megabytes": size_of(path)} for name, path in bundles.items()}
    for name, figures in latencies(bundles, rounds).items():
        rows[name] |= figures
    if checkpoint:
        for name, figures in trajectories(bundles).items():
            rows[name] |= figures
    return {
        "recipe": recipe,
        "weights": "trained" if checkpoint else "random",
        "batch": BATCH,
        "date": datetime.now(UTC).date().isoformat(),
        "load": os.getloadavg()[0],
        "schemes": rows,
    }


def size_of(path: Path) -> float:
    return sum((path / name).stat().st_size for name in ("model.onnx", "model.onnx.data")) / 1e6


def latencies(bundles: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Median processor seconds of a call, and the speed against float32, which takes turns with every scheme."""
    reference, feed = single_threaded(bundles["fp32"]), example(bundles["fp32"])
    times = {}
    for name, path in bundles.items():
        session = reference if name == "fp32" else single_threaded(path)
        timed(session, feed)
        theirs, mine = zip(*((timed(reference, feed), timed(session, feed)) for _ in range(rounds)), strict=True)
        ratio = statistics.median(theirs) / statistics.median(mine)
        times[name] = {"seconds": statistics.median(mine), "speed against fp32": ratio}
    return times


def single_threaded(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    multiply_exactly(options, path / "model.onnx")
    return ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def timed(session: ort.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    started = time.process_time()
    session.run(None, feed)
    return time.process_time() - started


def example(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {}
    network = load_bundle(path).network
    for port in network.graphs[network.main_graph].inputs:
        shape = dims(port, BATCH)
        integers = port.dtype == "int64"
        feed[port.name] = np.ones(shape, np.int64) if integers else rng.standard_normal(shape, np.float32)
    feed["t"] = np.full(BATCH, 500, np.float32)
    return feed


def trajectories(bundles: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Against float32: the error of each prediction on its states, and of each state of a trajectory of one's own."""
    opened = {name: OpenProgram.open(path).with_settings(steps=STEPS) for name, path in bundles.items()}
    reference = opened["fp32"]
    request = example_request(reference.condition, range(IMAGES), IMAGES)
    recorder = Recorder(reference.calls)
    expected = states(reference, recorder.calls, request)
    figures = {}
    for name, program in opened.items():
        errors = []
        for call in recorder.made:
            got = program.calls[call.role][call.index](call.graph, **call.inputs)
            errors += [compare(wanted, got[output]).relative_l2 for output, wanted in call.outputs.items()]
        pairs = zip(expected, states(program, program.calls, request), strict=True)
        snr = [compare(wanted, got).snr_db for wanted, got in pairs]
        figures[name] = {
            "relative L2": float(np.mean(errors)),
            "worst relative L2": max(errors),
            "SNR dB by step": [None if np.isinf(value) else round(value, 2) for value in snr],
            "SNR dB at the end": None if np.isinf(snr[-1]) else snr[-1],
        }
    return figures


def states(program: OpenProgram, calls: Calls, request: Request) -> list[np.ndarray]:
    return [step.state for step in program.program.run(calls, request, Draws(7, range(IMAGES)))]


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in fields.items()}
    return {
        "cpu": cpu["model name"],
        "cores": os.cpu_count(),
        "int8 products saturate by default": not is_exact(),
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "load at start": os.getloadavg()[0],
    }


def table(entry: dict[str, Any]) -> str:
    lines = [f"{entry['recipe']}, {entry['weights']} weights, batch {entry['batch']}"]
    for name, row in entry["schemes"].items():
        line = f"  {name:12} {row['megabytes']:8.1f} MB {row['seconds'] * 1e3:9.1f} ms"
        line += f" {row['speed against fp32']:6.2f}x"
        if "relative L2" in row:
            snr = row["SNR dB at the end"]
            line += f" {row['relative L2']:9.2e} {'inf' if snr is None else f'{snr:.1f}'} dB"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
