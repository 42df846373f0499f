"""Time the custom ops on a GPU against eager PyTorch, torch.compile and SDPA: ``python3 -m
benchmarks.gpu.ops``.

Needs a CUDA device, torch >= 2.11 and triton >= 3.6, and nothing else of dexport's dependencies. Every block
size of the tile tables is timed; ceilings (a copy, a matrix product) are measured in the same run. The
result goes to ``$OUT/ops.json``, ``ops.json`` in the current folder by default. ``--batch 8`` changes the
batch, ``--quick`` times the preferred tiles only.

HAS NOT BEEN EXECUTED: it was written without a GPU. Its parts that need none are tested.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.problems import Problem, published
from benchmarks.gpu.rivals import COMPUTES_SOMETHING_ELSE, EAGER, SDPA
from dexport.plugins.compile import parameters
from dexport.plugins.op import Dims, DType, Kernel, Op, Tile, resolve
from dexport.plugins.ternary_matmul.op import TERNARY_MATMUL
from dexport.plugins.ternary_matmul.packing import pack
from dexport.plugins.tiles import candidates

DTYPE: DType = "float16"
TOLERANCE = 1e-2
REPEATS = 50
COPY_BYTES = 1 << 30
MATMUL_SIDE = 8192


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images, both halves of a guided batch counted")
    parser.add_argument("--quick", action="store_true", help="time the preferred tiles only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(3, "a CUDA device is needed\n")
    target = "sm{}{}".format(*torch.cuda.get_device_capability())
    ceilings = measure_ceilings()
    report = {
        "device": torch.cuda.get_device_name(),
        "target": target,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": DTYPE,
        "batch": options.batch,
        "ceilings": ceilings,
        "problems": [],
    }
    for problem in published(options.batch):
        entry = time_problem(problem, target, ceilings, options.quick)
        report["problems"].append(entry)
        print(summary_line(entry), flush=True)
    path = Path(os.environ.get("OUT", ".")) / "ops.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0 if all(entry["correct"] for entry in report["problems"]) else 1


def time_problem(problem: Problem, target: str, ceilings: Mapping[str, float], quick: bool) -> dict[str, Any]:
    """Time every way to compute one problem; each is checked against the reference first."""
    inputs = example_inputs(problem, "cuda")
    expected = resolve(problem.op.reference)(*inputs, **problem.attributes)
    ways: dict[str, Callable[[], Any]] = {}
    eager = EAGER[problem.op.name]
    compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs")
    ways["eager"] = lambda: eager(*inputs, **problem.attributes)
    ways["torch.compile"] = lambda: compiled(*inputs, **problem.attributes)
    if problem.op.name in SDPA:
        ways["sdpa"] = lambda: SDPA[problem.op.name](*inputs, **problem.attributes)
    for name, kernels in forms(problem.op, problem.dims):
        tiles, tried = best_tiles(problem, kernels, inputs, target, quick)
        ways[name] = lambda kernels=kernels, tiles=tiles: run_kernels(problem, kernels, tiles, inputs)
        ways[name].tried = tried  # type: ignore[attr-defined]

    results: dict[str, Any] = {}
    for name, way in ways.items():
        error = relative_error(way(), expected)
        other = (problem.op.name, name) in COMPUTES_SOMETHING_ELSE
        seconds = time_of(way)
        results[name] = {
            "seconds": seconds,
            "error": None if other else error,
            **rates(problem, seconds, ceilings),
            "tiles": getattr(way, "tried", None),
        }
    ours = [name for name, _ in forms(problem.op, problem.dims)]
    rivals = [name for name in results if name not in ours]
    return {
        "name": problem.name,
        "op": problem.op.name,
        "shapes": problem.shapes,
        "bytes": problem.bytes_moved,
        "flops": problem.flops,
        "results": results,
        "correct": all(results[name]["error"] <= TOLERANCE for name in ours),
        "speedup_over_best_rival": min(results[name]["seconds"] for name in rivals)
        / min(results[name]["seconds"] for name in ours),
    }


def forms(op: Op, dims: Dims) -> list[tuple[str, tuple[Kernel, ...]]]:
    """The ways our kernels compute an op: its steps, its fused form, its plugin."""
    found = {"kernels": op.kernels}
    for name, kernel in (("fused", op.fused), ("plugin", op.plugin)):
        if kernel is not None and (kernel,) != op.kernels and kernel.fits(dims, DTYPE):
            found[name] = (kernel,)
    return list(found.items())


def best_tiles(
    problem: Problem, kernels: Sequence[Kernel], inputs: Sequence[Any], target: str, quick: bool
) -> tuple[list[Tile], dict[str, float]]:
    """The fastest tile of each kernel, and the seconds of every one tried; kernels are tuned one after the
    other."""
    chosen = [candidates(kernel, target, DTYPE)[0] for kernel in kernels]
    tried: dict[str, float] = {}
    for index, kernel in enumerate(kernels):
        options = candidates(kernel, target, DTYPE)[: 1 if quick else None]
        times = {}
        for tile in options:
            attempt = [*chosen[:index], tile, *chosen[index + 1 :]]
            try:
                times[describe(kernel, tile)] = (
                    time_of(lambda tiles=attempt: run_kernels(problem, kernels, tiles, inputs)),
                    tile,
                )
            except triton.runtime.errors.OutOfResources as refusal:
                print(f"{describe(kernel, tile)}: {refusal}")
        chosen[index] = min(times.values(), key=lambda item: item[0])[1]
        tried.update({name: seconds for name, (seconds, _) in times.items()})
    return chosen, tried


def run_kernels(problem: Problem, kernels: Sequence[Kernel], tiles: Sequence[Tile], inputs: Sequence[Any]) -> Any:
    """Launch through Triton, with the arguments and grid of a plugin."""
    dims = problem.dims
    tensors = {schema.name: value for schema, value in zip(problem.op.inputs, inputs, strict=True)}
    for kernel, tile in zip(kernels, tiles, strict=True):
        for schema in kernel.outputs:
            dtype = getattr(torch, schema.dtype or DTYPE)
            tensors[schema.name] = torch.empty(schema.dims(dims), dtype=dtype, device=inputs[0].device)
        arguments = [tensors[name] if kind == "tensor" else dims[name] for name, kind in parameters(kernel)]
        kernel.function()[kernel.grid(dims, tile.blocks)](
            *arguments,
            **kernel.constants(dims, DTYPE),
            **tile.blocks,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return tensors[problem.op.outputs[0].name]


def example_inputs(problem: Problem, device: str) -> list[torch.Tensor]:
    """Seeded half-precision noise; a square weight is scaled to keep its products at 1, packed values are ternary."""
    generator = torch.Generator().manual_seed(0)
    if problem.op is TERNARY_MATMUL:
        x, weight, _ = problem.shapes
        values = torch.randint(-1, 2, (4 * weight[0], weight[1]), generator=generator)
        half = [torch.randn(x, generator=generator), torch.full((1,), weight[1] ** -0.5)]
        x_half, scale = (tensor.to(device, getattr(torch, DTYPE)) for tensor in half)
        return [x_half, pack(values).to(device), scale]
    inputs = [torch.randn(shape, generator=generator) for shape in problem.shapes]
    scaled = [x / x.shape[0] ** 0.5 if x.shape[2:] == (1, 1) else x for x in inputs]
    return [x.to(device, getattr(torch, DTYPE)) for x in scaled]


def measure_ceilings() -> dict[str, float]:
    """Bytes/s of a copy (reads and writes counted) and FLOP/s of a float16 matrix product."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE, dtype=torch.float16, device="cuda")
    return {
        "bytes_per_second": 2 * COPY_BYTES / time_of(lambda: target.copy_(source)),
        "flops_per_second": 2 * MATMUL_SIDE**3 / time_of(lambda: a @ a),
    }


def time_of(function: Callable[[], Any]) -> float:
    """Median seconds over ``REPEATS`` runs, the L2 cache emptied before each."""
    times = triton.testing.do_bench(function, warmup=50, rep=200, return_mode="all")
    return statistics.median(times[-REPEATS:]) / 1e3


def rates(problem: Problem, seconds: float, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Achieved bytes/s and FLOP/s, and their shares of the measured ceilings."""
    moved, computed = problem.bytes_moved / seconds, problem.flops / seconds
    return {
        "bytes_per_second": moved,
        "flops_per_second": computed,
        "share_of_bandwidth": moved / ceilings["bytes_per_second"],
        "share_of_compute": computed / ceilings["flops_per_second"],
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def describe(kernel: Kernel, tile: Tile) -> str:
    blocks = " ".join(f"{name}={size}" for name, size in tile.blocks.items())
    return f"{kernel.name} {blocks} warps={tile.warps} stages={tile.stages}"


def summary_line(entry: Mapping[str, Any]) -> str:
    """One line per problem for the terminal."""
    times = "  ".join(f"{name} {result['seconds'] * 1e6:.1f} us" for name, result in entry["results"].items())
    verdict = "" if entry["correct"] else "  WRONG"
    return f"{entry['name']:20} x{entry['speedup_over_best_rival']:.2f}  {times}{verdict}"


if __name__ == "__main__":
    raise SystemExit(main())
