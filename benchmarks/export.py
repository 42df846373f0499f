"""From a float32 checkpoint on disk to a saved fp16 ONNX file: ``python3 -m benchmarks.export``.

Ours against ``torch.onnx.export(dynamo=True)`` followed by the float16 conversion of ONNX Runtime. Each run is a
process of its own, and the ways take turns. Processor seconds are what another load on the machine changes least. The
packed TerDiT has no second column: its checkpoint has no float32 weights to load. optimum is left out: it exports
models of transformers and diffusers, none of which this is.

The checkpoints hold random weights. They are written below ``--work``, one at a time, and removed. A model that is not
measured keeps its figures in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.child import Cost, run, summary, watching_children

MODELS = ("dit-xl-2", "dico-xl", "terdit-4.2b")
PACKED = ("terdit-600m", "terdit-4.2b", "terdit-7b")
GB = 1e9
RESULTS = Path(__file__).parent / "results" / "export.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None, help="where checkpoints and files go")
    parser.add_argument("--only", choices=["ours", "dynamo"], help="leave out the other way")
    parser.add_argument("--engine", action="store_true", help="also build a TensorRT-RTX engine from ours")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    from benchmarks.quantize import machine

    document: dict[str, Any] = {"models": {}}
    if arguments.output.exists():
        document = json.loads(arguments.output.read_text())
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            measured = measure(model, Path(folder), arguments.rounds, arguments.only)
            if arguments.engine:
                measured["engine"] = run("benchmarks.export:engine", recipe=model, folder=folder).result
        document["models"][model] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), **measured}
        print(table(model, measured), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(model: str, folder: Path, rounds: int, only: str | None) -> dict[str, Any]:
    """Every way to export one model, in turns."""
    checkpoint = folder / "model.safetensors"
    run("benchmarks.export:write_checkpoint", recipe=model, path=str(checkpoint))
    ways = [way for way in ("ours", "dynamo") if only in (None, way) and (way == "ours" or model not in PACKED)]
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    load = []
    for _ in range(rounds):
        for way in ways:
            load.append(os.getloadavg()[0])
            out = folder / way
            cost = run(f"benchmarks.export:{way}", recipe=model, checkpoint=str(checkpoint), out=str(out))
            # A build measures each step's peak anew, so that the process's own is that of the last step.
            steps = [step["peak_rss_bytes"] for step in cost.result or ()]
            costs[way].append(replace(cost, peak=max(cost.peak, *steps)) if steps else cost)
            shutil.rmtree(out)
    result: dict[str, Any] = {way: summary(found) for way, found in costs.items()}
    if "ours" in result:
        result["ours"]["steps"] = costs["ours"][-1].result
    if len(ways) == 2:
        result["faster"] = {key: round(result["dynamo"][key] / result["ours"][key], 2) for key in ("wall s", "cpu s")}
    return {"load": [round(value, 1) for value in load], "checkpoint GB": checkpoint.stat().st_size / GB, **result}


def write_checkpoint(recipe: str, path: str) -> None:
    """Random weights, in the layout that is released. No two are equal: TensorRT stores equal ones once."""
    from itertools import product

    import torch
    from safetensors.torch import save_file

    from dexport.exporter.recipes import find_recipe
    from dexport.exporter.variant import resolve
    from dexport.graphs.terdit import TernaryLinear

    network = resolve(find_recipe(recipe)).meta_module()
    packed = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, TernaryLinear)}
    # Four codes of two bits, of which three stand for a value.
    fours = torch.tensor(
        [a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4)], dtype=torch.uint8
    )
    tensors = {}
    for name, tensor in network.state_dict().items():
        if tensor.device.type != "meta":
            tensors[name] = tensor.clone()
        elif name in packed:
            rows, columns = tensor.shape
            tensors[name] = fours[torch.randint(len(fours), (rows // 4, columns))]
        else:
            fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 100
            tensors[name] = torch.randn(tensor.shape) / fan_in**0.5
    save_file(tensors, path)


def ours(recipe: str, checkpoint: str, out: str) -> list[dict[str, Any]]:
    """``dexport build --fp16`` without parity and without the cache; the seconds of its steps."""
    import dexport

    options = {"ternary_carrier": "packed"} if recipe in PACKED else {}
    result = dexport.build(recipe, out, checkpoint=checkpoint, precision="fp16", parity=False, cache=False, **options)
    return list(result.bundle.network.manifest["steps"])


def engine(recipe: str, folder: str) -> dict[str, Any]:
    """Seconds, peak bytes of the process that builds, and size of a TensorRT-RTX engine."""
    import dexport

    with watching_children() as peaks:
        result = dexport.build(
            recipe,
            f"{folder}/engine",
            checkpoint=f"{folder}/model.safetensors",
            precision="fp16",
            trt=True,
            engine="tensorrt-rtx",
            parity=False,
            cache=False,
        )
    report = result.bundle.network.entry()["engine"]
    kept = ("targets", "seconds_parse", "seconds_build", "peak_rss_bytes", "plan_bytes", "version")
    return {key: report[key] for key in kept} | peaks


def dynamo(recipe: str, checkpoint: str, out: str) -> None:
    """What one would write without dexport."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from safetensors.torch import load_file

    from dexport.exporter.recipes import find_recipe
    from dexport.exporter.variant import resolve

    Path(out).mkdir()
    variant = resolve(find_recipe(recipe))
    network = variant.module()
    network.load_state_dict(load_file(checkpoint))
    program = naive_program(network, variant)
    path = f"{out}/float32.onnx"
    program.save(path, external_data=True)
    del program, network
    model = convert_float_to_float16(onnx.load(path), keep_io_types=True, disable_shape_infer=True)
    onnx.save(model, f"{out}/model.onnx", save_as_external_data=True, location="model.onnx.data")


def naive_program(network: Any, variant: Any) -> Any:
    """``torch.onnx.export(dynamo=True)`` with a dynamic batch; custom ops become their ONNX function."""
    import numpy as np
    import torch

    from dexport.exporter.passes.attach_functions import AttachFunctions
    from dexport.plugins.translation import translation_table

    inputs = tuple(torch.from_numpy(np.asarray(x)) for x in variant.signature.example(2).values())
    batch = torch.export.Dim("B")
    program = torch.onnx.export(
        network,
        inputs,
        dynamo=True,
        verbose=False,
        opset_version=23,
        input_names=[spec.name for spec in variant.signature.inputs],
        output_names=["out"],
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        custom_translation_table=translation_table(),
    )
    assert program is not None
    AttachFunctions()(program.model)
    return program


def table(model: str, measured: dict[str, Any]) -> str:
    lines = [f"{model}: checkpoint {measured['checkpoint GB']:.2f} GB, load {max(measured['load'], default=0)}"]
    for way in ("ours", "dynamo"):
        if way in measured:
            row = measured[way]
            lines.append(f"  {way:8} {row['wall s']:8.1f} s wall {row['cpu s']:8.1f} s cpu {row['peak MB']:6} MB peak")
    if "faster" in measured:
        lines.append("  ours is " + ", ".join(f"{ratio}x by {key}" for key, ratio in measured["faster"].items()))
    if "engine" in measured:
        row = measured["engine"]
        seconds = row["seconds_parse"] + row["seconds_build"]
        peak, plan, own = (row[key] / 1e6 for key in ("peak_rss_bytes", "plan_bytes", "RssAnon"))
        lines.append(f"  engine   {seconds:8.1f} s wall {peak:21.0f} MB peak, {own:.0f} anonymous; plan {plan:.0f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
