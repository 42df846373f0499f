"""What INT8 costs and saves on this CPU: ``python3 -m benchmarks.quantize dit-xl-2 dit-fashion=WEIGHTS``.

For every model and scheme: size of the file, latency against float32 in ONNX Runtime, relative L2 of the predictions on
the float32 model's own trajectory, and SNR of the states of a trajectory of its own from the same noise. Models without
a checkpoint have random weights, whose trajectories mean nothing: only size and latency are measured.

Latency is processor time of one thread, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import dexport
from dexport.bundle import load_bundle
from dexport.runtime.noise import Noise
from dexport.runtime.pipeline import Pipeline
from dexport.runtime.samplers import Denoiser
from dexport.validate.metrics import compare

SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8 weights": {"int8": "weight"},
    "int8 weights, fp16": {"int8": "weight", "precision": "fp16"},
    "w8a8": {"int8": "w8a8"},
    "w8a8, fp16": {"int8": "w8a8", "precision": "fp16"},
}
STEPS = 20
IMAGES = 4
BATCH = 2
"""One image with guidance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="RECIPE[=CHECKPOINT]")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--work", type=Path, default=Path("out/quantize"), help="folder for the bundles, used again")
    parser.add_argument("--calibration-images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantize.json"))
    arguments = parser.parse_args()
    document = {"machine": machine(), "models": []}
    if arguments.output.exists():
        measured = {model.partition("=")[0] for model in arguments.models}
        before = json.loads(arguments.output.read_text())["models"]
        document["models"] = [entry for entry in before if entry["recipe"] not in measured]
    for model in arguments.models:
        recipe, _, checkpoint = model.partition("=")
        bundles = {name: build(arguments, recipe, checkpoint, name) for name in arguments.schemes}
        entry = measure(recipe, checkpoint, bundles, arguments.rounds)
        document["models"].append(entry)
        print(table(entry))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def build(arguments: argparse.Namespace, recipe: str, checkpoint: str, scheme: str) -> Path:
    """The bundle of one scheme; one that is there already is taken."""
    path = arguments.work / f"{recipe}-{scheme.replace(', ', '-').replace(' ', '-')}"
    if path.exists():
        return path
    options = dict(SCHEMES[scheme])
    if options.get("int8") == "w8a8":
        options["calibration_images"] = arguments.calibration_images
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
        "schemes": rows,
    }


def size_of(path: Path) -> float:
    return sum((path / name).stat().st_size for name in ("model.onnx", "model.onnx.data")) / 1e6


def latencies(bundles: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Processor seconds of the fastest call, and the speed against float32, which takes turns with every scheme."""
    reference, feed = single_threaded(bundles["fp32"]), example(bundles["fp32"])
    times = {}
    for name, path in bundles.items():
        session = reference if name == "fp32" else single_threaded(path)
        timed(session, feed)
        theirs, mine = zip(*((timed(reference, feed), timed(session, feed)) for _ in range(rounds)), strict=True)
        times[name] = {"seconds": min(mine), "speed against fp32": min(theirs) / min(mine)}
    return times


def single_threaded(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def timed(session: ort.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    started = time.process_time()
    session.run(None, feed)
    return time.process_time() - started


def example(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {}
    for spec in load_bundle(path).manifest["io"]["inputs"]:
        shape = [BATCH if dim == "B" else dim for dim in spec["shape"]]
        integers = spec["dtype"] == "int64"
        feed[spec["name"]] = np.ones(shape, np.int64) if integers else rng.standard_normal(shape, np.float32)
    feed["t"] = np.full(BATCH, 500, np.float32)
    return feed


def trajectories(bundles: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Against float32: the error of each prediction on its states, and of each state of a trajectory of one's own."""
    opened = {name: Pipeline.open(path) for name, path in bundles.items()}
    labels = [n * (opened["fp32"].classes or 1) // IMAGES for n in range(IMAGES)]
    inputs: list[tuple[np.ndarray, np.ndarray]] = []
    predictions: list[np.ndarray] = []

    def remembered(denoiser: Denoiser) -> Denoiser:
        def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
            inputs.append((x, t))
            predictions.append(denoiser(x, t))
            return predictions[-1]

        return denoise

    expected = states(opened["fp32"], remembered(opened["fp32"].denoiser(labels)))
    figures = {}
    for name, pipeline in opened.items():
        denoiser = pipeline.denoiser(labels)
        errors = [
            compare(wanted, denoiser(x, t)).relative_l2 for (x, t), wanted in zip(inputs, predictions, strict=True)
        ]
        pairs = zip(expected, states(pipeline, denoiser), strict=True)
        snr = [compare(wanted, got).snr_db for wanted, got in pairs]
        figures[name] = {
            "relative L2": float(np.mean(errors)),
            "worst relative L2": max(errors),
            "SNR dB by step": [None if np.isinf(value) else round(value, 2) for value in snr],
            "SNR dB at the end": None if np.isinf(snr[-1]) else snr[-1],
        }
    return figures


def states(pipeline: Pipeline, denoiser: Denoiser) -> list[np.ndarray]:
    sampler, noise = pipeline.sampler(steps=STEPS), Noise(7, range(IMAGES))
    start = sampler.start(noise, (IMAGES, *pipeline.shape))
    return [step.x for step in sampler.run(denoiser, start, noise)]


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in fields.items()}
    return {
        "cpu": cpu["model name"],
        "cores": os.cpu_count(),
        "vnni": "avx512_vnni" in cpu["flags"],
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "load at start": os.getloadavg()[0],
    }


def table(entry: dict[str, Any]) -> str:
    lines = [f"{entry['recipe']}, {entry['weights']} weights, batch {entry['batch']}"]
    for name, row in entry["schemes"].items():
        line = f"  {name:20} {row['megabytes']:8.1f} MB {row['seconds'] * 1e3:9.1f} ms"
        line += f" {row['speed against fp32']:6.2f}x"
        if "relative L2" in row:
            snr = row["SNR dB at the end"]
            line += f" {row['relative L2']:9.2e} {'inf' if snr is None else f'{snr:.1f}'} dB"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
