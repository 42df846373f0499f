"""Time a bundle's TensorRT engine on a GPU, with and without CUDA graphs, against ONNX Runtime's CUDA provider:
``python3 -m benchmarks.gpu.session BUNDLE``.

Needs a CUDA device, the TensorRT that built the engine and cuda-python; ONNX Runtime is compared where it has its CUDA
provider. A time is that of a whole call, copies from and to the host included, as a sampler waits for it. The result
goes to ``$OUT/session.json``, ``session.json`` in the current folder by default. ``--batch 1 --batch 8`` chooses the
batches, the engine's least, best and largest by default.

HAS NOT BEEN EXECUTED: it was written without a GPU. Its parts that need none are tested.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dexport.bundle import Network, load_bundle
from dexport.contract import Graph
from dexport.errors import DexportError, MachineError
from dexport.runtime.cuda import Cuda, find_gpu
from dexport.runtime.session import OnnxSession
from dexport.runtime.tensorrt_session import TensorRtSession

REFERENCE = "tensorrt"
TOLERANCES = {"tensorrt, CUDA graphs": 1e-5, "onnxruntime": 1e-2}
"""Largest relative L2 distance from the engine without graphs: the same kernels, or others in the same precision."""
WARM_UP = 5
REPEATS = 50

Ways = Mapping[str, Callable[[Network], Any]]
WAYS: Ways = {
    REFERENCE: lambda network: TensorRtSession(network, cuda_graph=False),
    "tensorrt, CUDA graphs": lambda network: TensorRtSession(network),
    "onnxruntime": lambda network: OnnxSession(network.model_path(), "cuda"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of a bundle with an engine")
    parser.add_argument("--batch", type=int, action="append", help="rows of a call, guidance counted. Repeatable.")
    options = parser.parse_args(arguments)
    try:
        gpu = find_gpu(Cuda())
        bundle = load_bundle(options.bundle)
        report = {
            "device": gpu.name,
            "target": gpu.target,
            "bundle": bundle.manifest["name"],
            "precision": bundle.network.manifest["precision"]["name"],
            **compare(bundle.network, options.batch or sorted(set(bundle.network.manifest["batch"].values())), WAYS),
        }
    except DexportError as error:
        parser.exit(error.exit_code, f"{error}\n{error.hint}\n")
    path = Path(os.environ.get("OUT", ".")) / "session.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0 if report["correct"] else 1


def compare(network: Network, batches: Sequence[int], ways: Ways) -> dict[str, Any]:
    """Time every way, one after the other, and compare its outputs with the first one's.

    Raises:
        DexportError: the first way does not run. Another one that lacks something is reported as not run.
    """
    feeds = {batch: example_inputs(network.graphs[network.main_graph], batch) for batch in batches}
    expected: dict[int, Mapping[str, np.ndarray]] = {}
    results: dict[str, Any] = {}
    for name, open_way in ways.items():
        started = time.perf_counter()
        try:
            session = open_way(network)
        except MachineError as error:
            if not expected:
                raise
            results[name] = {"not_run": str(error)}
            print(f"{name:24} not run: {error}", flush=True)
            continue
        result = {"runner": session.runner, "seconds_open": time.perf_counter() - started, "batches": {}}
        with session if hasattr(session, "close") else contextlib.nullcontext():
            for batch, feed in feeds.items():
                entry = time_way(session, feed)
                outputs = entry.pop("outputs")
                entry["error"] = relative_error(outputs, expected.setdefault(batch, outputs))
                result["batches"][str(batch)] = entry
                print(summary_line(name, batch, entry), flush=True)
        results[name] = result
    return {"results": results, "correct": agrees(results)}


def time_way(session: Any, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Seconds of the first call, which may compile, and the median of the later ones; the outputs of the last."""
    started = time.perf_counter()
    session(**feed)
    first = time.perf_counter() - started
    for _ in range(WARM_UP):
        session(**feed)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        outputs = session(**feed)
        times.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(times),
        "seconds_first": first,
        "seconds_worst": max(times),
        "outputs": outputs,
    }


def example_inputs(graph: Graph, batch: int) -> dict[str, np.ndarray]:
    """Seeded noise for float inputs, values of their range for integer ones, in the shapes of the ports."""
    random = np.random.default_rng(0)
    inputs = {}
    for port in graph.inputs:
        shape = port.dims(batch)
        low, high = port.range or (0, 0)
        integer = np.issubdtype(np.dtype(port.dtype), np.integer)
        values = random.integers(low, high, shape, endpoint=True) if integer else random.standard_normal(shape)
        inputs[port.name] = np.asarray(values, port.dtype)
    return inputs


def relative_error(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Largest L2 distance of an output, relative to its norm; infinite where one is not finite."""
    errors = [
        float(np.linalg.norm(actual[name] - expected[name]) / max(np.linalg.norm(expected[name]), 1e-30))
        for name in expected
    ]
    return max(error if np.isfinite(error) else float("inf") for error in errors)


def agrees(results: Mapping[str, Any]) -> bool:
    """Whether every way that ran is within its tolerance; a reference that is not finite never is."""
    return all(
        entry["error"] <= TOLERANCES.get(name, 0.0)
        for name, result in results.items()
        for entry in result.get("batches", {}).values()
    )


def summary_line(name: str, batch: int, entry: Mapping[str, Any]) -> str:
    """One line per way and batch for the terminal."""
    return (
        f"{name:24} batch {batch:3}  {entry['seconds'] * 1e3:8.2f} ms  first {entry['seconds_first'] * 1e3:8.1f} ms  "
        f"error {entry['error']:.1e}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
