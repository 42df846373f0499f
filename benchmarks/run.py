"""One evaluation of a network on this CPU: ``python3 -m benchmarks.run``.

Our graph in ONNX Runtime, float32 and INT8, against PyTorch eager (NCHW and channels-last), torch.compile and the plain
``torch.onnx.export(dynamo=True)`` in ONNX Runtime; OpenVINO on that plain file where it is installed. All have the same
random weights and the same number of threads and take turns. ``of peak`` is the share of the machine's float32 matrix
product rate, which is measured among them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dexport
from benchmarks.export import naive_program
from benchmarks.quantize import machine
from dexport.exporter.checkpoint import load_into, open_weights
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import Variant, resolve
from dexport.runtime.session import OnnxSession
from dexport.validate.eager import PRODUCT_FLOPS, Eager, matrix_product
from dexport.validate.timing import take_turns

MODELS = ("dit-s-2", "dit-b-2", "dico-s", "dico-b")
PRODUCT = "matrix product"
RESULTS = Path(__file__).parent / "results" / "run.json"

Feed = dict[str, np.ndarray]
Runner = Callable[[Feed], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without", nargs="+", default=[], metavar="COLUMN", help="leave columns out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {
        "machine": {**machine(), "threads": arguments.threads, "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "models": [],
    }
    for model in arguments.models:
        variant = resolve(find_recipe(model))
        with tempfile.TemporaryDirectory() as folder:
            runners = columns(variant, Path(folder), arguments.threads, arguments.without)
            for batch in arguments.batch:
                entry = measure(variant, runners, batch, arguments.rounds)
                document["models"].append(entry)
                print(table(entry), flush=True)
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def columns(variant: Variant, folder: Path, threads: int, without: list[str]) -> dict[str, Runner]:
    """What takes turns, by name."""
    weights = open_weights(None, variant.meta_module())
    network = load_into(weights, variant.meta_module())

    def eager(module: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Runner:
        def runner(feed: Feed) -> np.ndarray:
            inputs = [torch.from_numpy(array) for array in feed.values()]
            inputs[0] = inputs[0].contiguous(memory_format=memory_format)
            with torch.inference_mode():
                return module(*inputs).numpy()

        return runner

    def ours(**options: Any) -> Runner:
        path = folder / "-".join(["ours", *map(str, options.values())])
        dexport.build(variant.recipe.name, path, parity=False, cache=False, **options)
        return onnx_runner(path / "model.onnx", threads)

    def channels_last() -> Runner:
        copy = load_into(weights, variant.meta_module()).to(memory_format=torch.channels_last)
        return eager(copy, torch.channels_last)

    naive_path = folder / "naive.onnx"

    def naive() -> Runner:
        naive_program(network, variant).save(str(naive_path), external_data=True)
        return onnx_runner(naive_path, threads)

    def openvino() -> Runner:
        module = importlib.import_module("openvino")
        if not naive_path.exists():
            naive()
        compiled = module.Core().compile_model(str(naive_path), "CPU", {"INFERENCE_NUM_THREADS": threads})
        return lambda feed: compiled(feed)[0]

    makers: dict[str, Callable[[], Runner]] = {
        "ours": ours,
        "ours, INT8 weights": lambda: ours(int8="weight"),
        "eager": lambda: eager(network),
        "eager, channels-last": channels_last,
        "torch.compile": lambda: eager(torch.compile(load_into(weights, variant.meta_module()))),
        "naive export": naive,
        "openvino, naive export": openvino,
    }
    if importlib.util.find_spec("openvino") is None:
        without = [*without, "openvino, naive export"]
    return {name: make() for name, make in makers.items() if name not in without}


def onnx_runner(path: Path, threads: int) -> Runner:
    session = OnnxSession(path, threads=threads)
    return lambda feed: session(**{name: feed[name] for name in session.inputs})["out"]


def measure(variant: Variant, runners: dict[str, Runner], batch: int, rounds: int) -> dict[str, Any]:
    """Wall and processor seconds of every column and of a matrix product, in turns."""
    feed = {name: np.asarray(array) for name, array in variant.signature.example(batch).items()}
    flops = Eager.of_variant(variant, None).flops(batch)
    outputs = {name: run(feed) for name, run in runners.items()}
    expected = next(iter(outputs.values()))
    work: dict[str, Callable[[], object]] = {name: partial(run, feed) for name, run in runners.items()}
    load = os.getloadavg()[0]
    times = take_turns({**work, PRODUCT: matrix_product()}, rounds)
    peak = PRODUCT_FLOPS / times[PRODUCT].fastest
    ours = times.get("ours")
    rows = {}
    for name in runners:
        taken = times[name]
        faster = {"wall": taken.median / ours.median, "cpu": taken.median_cpu / ours.median_cpu} if ours else None
        rows[name] = {
            "wall s": round(taken.median, 4),
            "fastest s": round(taken.fastest, 4),
            "cpu s": round(taken.median_cpu, 4),
            "ours is faster by": faster and {kind: round(ratio, 2) for kind, ratio in faster.items()},
            "of peak": round(flops / taken.fastest / peak, 3),
            "relative L2 to ours": float(np.linalg.norm(outputs[name] - expected) / np.linalg.norm(expected)),
        }
    return {
        "recipe": variant.recipe.name,
        "batch": batch,
        "gflop": round(flops / 1e9, 2),
        "peak gflop/s": round(peak / 1e9, 1),
        "load": load,
        "columns": rows,
    }


def table(entry: dict[str, Any]) -> str:
    lines = [
        f"{entry['recipe']}, batch {entry['batch']}, {entry['gflop']} GFLOP, "
        f"matrix product {entry['peak gflop/s']} GFLOP/s, load {entry['load']:.1f}"
    ]
    for name, row in entry["columns"].items():
        ratio = row["ours is faster by"] or {"wall": 0, "cpu": 0}
        lines.append(
            f"  {name:24} {row['wall s'] * 1e3:9.1f} ms  {ratio['wall']:5.2f}x wall {ratio['cpu']:5.2f}x cpu  "
            f"{row['of peak']:6.1%} of peak"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
