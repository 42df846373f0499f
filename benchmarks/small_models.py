"""What a precision costs in distance to real images: ``python3 -m benchmarks.small_models --real fashion-test.npz``.

For every trained small model and scheme: the distance of its images to real Fashion-MNIST test images minus that of
PyTorch's images from the same noise, with a bootstrap interval over pairs. ``tools/fashion_reference.py`` makes the
file of real images. Bundles, pictures and features are kept in ``--work``: a run that was killed goes on there.

Half precision runs with every rounding explicit, as `dexport validate` does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import dexport
from dexport.bundle import load_bundle
from dexport.validate.levels.distribution import DistributionReport
from dexport.validate.validate import Distribution, validate

ROOT = Path(__file__).parent.parent
MODELS = (
    "dit-fashion-s",
    "dit-fashion",
    "dico-fashion-s",
    "dico-fashion",
    "diffit-fashion",
    "lit-fashion",
    "terdit-fashion",
)
SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "INT8 weights": {"int8": "weight"},
    "W8A8": {"int8": "w8a8"},
    "ternary after training": {"ternary": True},
}
TERNARY: dict[str, dict[str, Any]] = {
    "fp32, dense": {"ternary": False},
    "ternary, INT4": {"ternary": True, "ternary_carrier": "int4"},
    "ternary, INT4, fp16": {"ternary": True, "ternary_carrier": "int4", "precision": "fp16"},
}
"""Of models that were trained ternary."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--real", type=Path, required=True, help="real images: .npz with arr_0")
    parser.add_argument("--real-count", type=int, default=2000, help="the first so many of them")
    parser.add_argument(
        "--evaluator", default="efficientnet-lite0", choices=["inception", "efficientnet-lite0", "pixels"]
    )
    parser.add_argument("--count", type=int, default=10, help="images per class")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/small-models"), help="folder, used again")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/small-models.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    real = first_images(arguments.real, arguments.real_count, arguments.work)
    settings = {name: getattr(arguments, name) for name in ("evaluator", "count", "steps", "seed", "real_count")}
    document: dict[str, Any] = {"machine": machine(), "settings": settings, "models": {}}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if before["settings"] == settings:
            document["models"] = before["models"]
    for model in arguments.models:
        schemes = TERNARY if model.startswith("terdit") else SCHEMES
        document["models"][model] = {
            name: measure(arguments, model, name, options, real) for name, options in schemes.items()
        }
        write(arguments.output, json.dumps(document, indent=1) + "\n")
        write(arguments.output.with_suffix(".md"), table(document))
    print(table(document))


def first_images(path: Path, count: int, work: Path) -> Path:
    """Some of the real images as a file of their own: evaluating all takes longer than everything else."""
    some = work / f"real-{count}.npz"
    if not some.exists():
        with np.load(path) as file:
            np.savez(some, file["arr_0"][:count])
    return some


def measure(
    arguments: argparse.Namespace, model: str, scheme: str, options: dict[str, Any], real: Path
) -> dict[str, Any]:
    """Build where there is no bundle yet, sample, compare."""
    started = time.process_time()
    path = arguments.work / f"{model}-{scheme.replace(', ', '-').replace(' ', '-')}"
    if not path.exists():
        print(f"building {path}", flush=True)
        checkpoint = str(ROOT / f"checkpoints/{model}.safetensors")
        dexport.build(model, path, checkpoint=checkpoint, parity=False, profile="ci", **options)
    chosen = Distribution(real, arguments.evaluator, count=arguments.count, batch=8, work=arguments.work / "sets")
    result = validate(
        load_bundle(path),
        ["trajectory", "distribution"],
        settings={"steps": arguments.steps},
        seed=arguments.seed,
        distribution=chosen,
    )
    report, trajectory = result.distribution, result.trajectory
    assert report is not None and trajectory is not None
    seconds = time.process_time() - started
    print(f"{model}, {scheme}: {report.delta.delta:+.4f} in {seconds:.0f} s of processor time", flush=True)
    return {
        **figures(report),
        "snr_db": trajectory.states[-1].metrics.snr_db,
        "onnx_bytes": load_bundle(path).network.manifest["sizes"]["onnx"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def figures(report: DistributionReport) -> dict[str, Any]:
    """What the table needs, and what it stands on."""
    kernel = report.kernel_delta
    assert kernel is not None
    lean = replace(report, pairs=(), histograms=())
    kept = ("distance", "kernel_distance", "count", "real_count", "weights_sha256", "lowest_psnr_db", "floor")
    document = lean.to_json()
    return {
        **{name: document[name] for name in kept},
        "delta": document["delta"],
        "kernel_delta": document["kernel_delta"],
    }


def table(document: dict[str, Any]) -> str:
    """The table as Markdown."""
    settings = document["settings"]
    some = next(row for rows in document["models"].values() for row in rows.values())
    floor = some["floor"]
    columns = ("model", "scheme", "delta", "interval", "kernel delta x 1000", "interval")
    columns += ("PyTorch", "MB", "SNR dB", "worst PSNR dB")
    lines = [
        f"{some['distance']}, {some['count']} images of every set from the same noise, {settings['steps']} steps, "
        f"seed {settings['seed']}; {some['real_count']:,} real test images. Floor: {floor['frechet']:.1f} for "
        f"{floor['count']} real images against {floor['against']:,} others. Delta: the bundle's distance minus "
        "PyTorch's, with its 95 % interval.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for model, rows in document["models"].items():
        for scheme, row in rows.items():
            delta, kernel = row["delta"], row["kernel_delta"]
            psnr = "equal" if row["lowest_psnr_db"] is None else f"{row['lowest_psnr_db']:.1f}"
            cells = (
                model,
                scheme,
                f"{delta['delta']:+.3f}",
                f"{delta['low']:+.3f} to {delta['high']:+.3f}",
                f"{1e3 * kernel['delta']:+.3f}",
                f"{1e3 * kernel['low']:+.3f} to {1e3 * kernel['high']:+.3f}",
                f"{delta['b']:.1f}",
                f"{row['onnx_bytes'] / 1e6:.2f}",
                f"{row['snr_db']:.1f}",
                psnr,
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "onnxruntime": ort.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    main()
