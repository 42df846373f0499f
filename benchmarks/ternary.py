"""Time the ternary carriers in ONNX Runtime on a CPU at the layers of TerDiT-600M: ``python3 -m benchmarks.ternary``.

Every layer is stored as ``dexport build`` stores it and run in a plain session. The carriers take turns, so that what
else the machine does hits all of them; a figure is the median. A forward pass is the sum over the layers, times how
often each occurs.
Writes ``benchmarks/results/ternary-cpu.json``, from which ``--ternary-carrier auto`` takes its choice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dexport.exporter.export import save
from dexport.exporter.passes.attach_functions import AttachFunctions
from dexport.exporter.passes.fold_weight_transposes import FoldWeightTransposes
from dexport.exporter.passes.lazy import add_initializer
from dexport.exporter.quantize.carriers import CARRIERS
from dexport.exporter.quantize.ternary import find_layer

DENSE = "dense"
RESULTS = Path(__file__).parent / "results" / "ternary-cpu.json"
BLOCKS = 16
TOKENS = 256
EXACT = 5e-6


@dataclass(frozen=True)
class Shape:
    """A layer (columns -> rows) that occurs ``count`` times in a forward pass, on ``tokens`` rows per image."""

    name: str
    rows: int
    columns: int
    tokens: int
    count: int


LAYERS = (
    Shape("attention", 1536, 1536, TOKENS, 4 * BLOCKS),
    Shape("feed-forward in", 4096, 1536, TOKENS, 2 * BLOCKS),
    Shape("feed-forward out", 1536, 4096, TOKENS, BLOCKS),
    Shape("modulation", 9216, 1024, 1, BLOCKS),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7, help="at least 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if options.repeats < 5:
        parser.error("a median of fewer than 5 runs says nothing")
    report: dict[str, Any] = {
        "model": "TerDiT-600M, ternary layers, float32",
        "onnxruntime": ort.__version__,
        "threads": options.threads,
        "repeats": options.repeats,
        "batches": {},
    }
    for batch in options.batch:
        layers = [time_layer(shape, batch, options.threads, options.repeats) for shape in LAYERS]
        report["batches"][str(batch)] = summary(layers)
        print(table(batch, report["batches"][str(batch)]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULTS}")
    return 0


def time_layer(shape: Shape, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    """Median seconds, error and bytes of every carrier at one layer."""
    rng = np.random.default_rng(shape.rows)
    weight = rng.integers(-1, 2, (shape.rows, shape.columns)).astype(np.float32)
    x = rng.standard_normal((batch, shape.tokens, shape.columns), np.float32)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    results: dict[str, dict[str, Any]] = {}
    sessions: dict[str, ort.InferenceSession] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (DENSE, *CARRIERS):
            path = Path(folder) / name / "model.onnx"
            path.parent.mkdir()
            save(layer_model(weight, name), path)
            sessions[name] = open_session(path, threads)
            out = sessions[name].run(None, {"x": x})[0]
            results[name] = {
                "error": float(np.linalg.norm(out - expected) / np.linalg.norm(expected)),
                "bytes": sum(file.stat().st_size for file in path.parent.iterdir()),
            }
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeats):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append(time.perf_counter() - started)
    for name, seconds in times.items():
        results[name]["seconds"] = statistics.median(seconds)
    return {"layer": vars(shape), "carriers": results}


def layer_model(weight: np.ndarray, carrier: str) -> ir.Model:
    """One layer as the exporter stores it."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "T", weight.shape[1]]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="layer")
    stored = add_initializer(graph, ir.Tensor(weight, name="weight"))
    scale = add_initializer(graph, ir.Tensor(np.ones(1, np.float32), name="scale"))
    transpose = ir.node("Transpose", [stored], attributes={"perm": [1, 0]})
    matmul = ir.node("MatMul", [x, transpose.outputs[0]])
    scaled = ir.node("Mul", [matmul.outputs[0], scale])
    graph.extend([transpose, matmul, scaled])
    out = scaled.outputs[0]
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", "T", weight.shape[0]])
    graph.outputs.append(out)
    model = ir.Model(graph, ir_version=11)
    if carrier == DENSE:
        FoldWeightTransposes()(model)
    else:
        CARRIERS[carrier].store(graph, find_layer(graph, "weight"))
    AttachFunctions()(model)
    return model


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def summary(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per carrier: seconds of a forward pass, how much faster than dense, worst error, megabytes, and the layers."""
    total: dict[str, dict[str, Any]] = {}
    for name in (DENSE, *CARRIERS):
        entries = [(layer["layer"]["count"], layer["carriers"][name]) for layer in layers]
        worst = max(entry["error"] for _, entry in entries)
        total[name] = {
            "seconds": sum(count * entry["seconds"] for count, entry in entries),
            "worst_error": worst,
            "exact": worst <= EXACT,
            "megabytes": sum(count * entry["bytes"] for count, entry in entries) / 1e6,
            "layer_seconds": {layer["layer"]["name"]: layer["carriers"][name]["seconds"] for layer in layers},
        }
    for entry in total.values():
        entry["ratio_to_dense"] = total[DENSE]["seconds"] / entry["seconds"]
    return total


def table(batch: int, total: dict[str, Any]) -> str:
    lines = [f"batch {batch}"]
    for name, entry in total.items():
        lines.append(
            f"  {name:7} x{entry['ratio_to_dense']:.2f}  {entry['seconds']:7.2f} s  {entry['megabytes']:6.0f} MB  "
            f"error {entry['worst_error']:.1e}  "
            + "  ".join(f"{layer} {seconds * 1e3:.1f} ms" for layer, seconds in entry["layer_seconds"].items())
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
