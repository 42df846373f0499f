"""One evaluation of a network on this CPU: ``python3 -m benchmarks.run``.

Our graph in ONNX Runtime, float32 and INT8, against PyTorch eager (NCHW and channels-last), torch.compile and the plain
``torch.onnx.export(dynamo=True)`` in ONNX Runtime; OpenVINO on that plain file, in float32, where it is installed. All
have the same random weights and the same number of threads and take turns.

Figures are processor seconds: on one thread, which is the default, those are what a column needs, whatever else the
machine does. ``of peak`` is the share of the rate of a large float32 matrix product in PyTorch or ONNX Runtime, the
faster of the two, which are measured among the columns. Models that are not measured keep their place in the file.
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
import onnx
import onnx.inliner
import torch

import dexport
from benchmarks.export import naive_program
from benchmarks.quantize import machine
from dexport.exporter.export import export_onnx
from dexport.exporter.options import BuildOptions
from dexport.exporter.quantize.calibrate import FEWEST_IMAGES, Calibration, calibrate
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.request import request_of
from dexport.exporter.quantize.schemes import quantised_layers
from dexport.exporter.recipes import find_recipe
from dexport.exporter.resolve import asked_of
from dexport.exporter.steps import StepLog
from dexport.exporter.tracing.trace import DEFAULT_OPSET
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import load_into, open_weights
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.session import OnnxSession
from dexport.validate.bench.timing import take_turns
from dexport.validate.bench.torch_baseline import Eager

MODELS = ("dit-s-2", "dit-b-2", "dico-s", "dico-b")
PEAK_SIDE = 1024
RESULTS = Path(__file__).parent / "results" / "run.json"

Feed = dict[str, np.ndarray]
Runner = Callable[[Feed], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="+", default=[], metavar="COLUMN", help="leave columns out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {
        "machine": {**machine(), "threads": arguments.threads, "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "models": [],
    }
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())["models"]
        document["models"] = [entry for entry in before if entry["recipe"] not in arguments.models]
    for model in arguments.models:
        variant = resolve(find_recipe(model))
        with tempfile.TemporaryDirectory() as folder:
            runners = columns(variant, Path(folder), arguments.threads, arguments.without)
            for batch in arguments.batch:
                entry = measure(variant, runners, batch, arguments.rounds, arguments.threads)
                document["models"].append(entry)
                print(table(entry), flush=True)
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def columns(variant: Variant, folder: Path, threads: int, without: list[str]) -> dict[str, Runner]:
    """What takes turns, by name."""
    weights = open_weights(None, variant.outline)
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

    def w8a8() -> Runner:
        target = folder / "w8a8"
        target.mkdir()
        write_w8a8(variant, weights, target)
        return onnx_runner(target / "model.onnx", threads)

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
        model = onnx.inliner.inline_local_functions(onnx.load(naive_path))  # it has no functions of its own
        inlined = folder / "inlined.onnx"
        onnx.save(model, inlined, save_as_external_data=True, location="inlined.data")
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = module.Core().compile_model(str(inlined), "CPU", settings)
        return lambda feed: compiled(feed)[0]

    makers: dict[str, Callable[[], Runner]] = {
        "ours": ours,
        "ours, INT8 weights": lambda: ours(int8="weight"),
        "ours, W8A8": w8a8,
        "eager": lambda: eager(network),
        "eager, channels-last": channels_last,
        "torch.compile": lambda: eager(torch.compile(network)),
        "naive export": naive,
        "openvino, naive export": openvino,
    }
    if importlib.util.find_spec("openvino") is None:
        without = [*without, "openvino, naive export"]
    return {name: make() for name, make in makers.items() if name not in without}


def write_w8a8(variant: Variant, weights: WeightSource, folder: Path) -> None:
    """With the ranges of a trajectory of two steps: how long a product takes does not depend on them.

    Random weights let the trajectory grow. Where a layer reads the image unnormalised, as between DiCo's levels, the
    ranges are then too wide and the output is no prediction.
    """
    islands, opset = variant.recipe.islands, DEFAULT_OPSET
    asked = asked_of(BuildOptions(folder, int8="w8a8"))
    request = request_of(variant, asked, None, islands.modules, None, False, opset)
    assert request is not None
    settings = Calibration(images=FEWEST_IMAGES, steps=2)
    statistics = calibrate(
        variant, weights, settings, quantised_layers(request.schemes), folder / "calibration.npz", lambda *_: None
    )
    plan = Plan(request.schemes, statistics)
    export_onnx(variant, weights, folder, precision="fp32", islands=islands, opset=opset, log=StepLog(), plan=plan)


def onnx_runner(model: Path | bytes, threads: int) -> Runner:
    session = OnnxSession(model, threads=threads)
    return lambda feed: session(**{name: feed[name] for name in session.inputs})["out"]


def measure(variant: Variant, runners: dict[str, Runner], batch: int, rounds: int, threads: int) -> dict[str, Any]:
    """Wall and processor seconds of every column and of two matrix products, in turns."""
    feed = {name: np.asarray(array) for name, array in variant.signature.example(batch).items()}
    flops = Eager.of_variant(variant, None).flops(batch)
    outputs = {name: run(feed) for name, run in runners.items()}
    expected = next(iter(outputs.values()))
    products = matrix_products(threads)
    work: dict[str, Callable[[], object]] = {name: partial(run, feed) for name, run in runners.items()}
    load = os.getloadavg()[0]
    times = take_turns(work | products, rounds)
    # The fastest of the matrix products is the rate that the machine can reach.
    peak = 2 * PEAK_SIDE**3 / min(seconds for name in products for seconds in times[name].cpu)
    ours = times.get("ours")
    rows = {}
    for name in runners:
        taken = times[name]
        rows[name] = {
            "cpu s": round(taken.median_cpu, 4),
            "fastest cpu s": round(min(taken.cpu), 4),
            "wall s": round(taken.median, 4),
            "fastest wall s": round(taken.fastest, 4),
            "ours is faster by": ours and round(taken.median_cpu / ours.median_cpu, 3),
            "of peak": round(flops / taken.median_cpu / peak, 3),
            "relative L2 to ours": float(np.linalg.norm(outputs[name] - expected) / np.linalg.norm(expected)),
        }
    return {
        "recipe": variant.recipe.name,
        "batch": batch,
        "rounds": rounds,
        "gflop": round(flops / 1e9, 2),
        "peak gflop per cpu s": round(peak / 1e9, 1),
        "load": round(load, 1),
        "columns": rows,
    }


def matrix_products(threads: int) -> dict[str, Callable[[], object]]:
    """A large product in both libraries."""
    a, b = torch.randn(PEAK_SIDE, PEAK_SIDE), torch.randn(PEAK_SIDE, PEAK_SIDE)
    shape = [PEAK_SIDE, PEAK_SIDE]
    x, out = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "out"))
    weight = onnx.numpy_helper.from_array(b.numpy(), "w")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["out"])], "peak", [x], [out], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    run = onnx_runner(model.SerializeToString(), threads)
    return {"product, PyTorch": lambda: a @ b, "product, ONNX Runtime": lambda: run({"x": a.numpy()})}


def table(entry: dict[str, Any]) -> str:
    lines = [
        f"{entry['recipe']}, batch {entry['batch']}, {entry['gflop']} GFLOP, "
        f"{entry['peak gflop per cpu s']} GFLOP per processor second at most, load {entry['load']}"
    ]
    for name, row in entry["columns"].items():
        ratio = row["ours is faster by"] or 0
        lines.append(f"  {name:24} {row['cpu s'] * 1e3:9.1f} ms  {ratio:5.2f}x  {row['of peak']:6.1%} of peak")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
