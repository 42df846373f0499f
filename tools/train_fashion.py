"""Train the small models of ``dexport/exporter/recipes/fashion.py`` on Fashion-MNIST, on a CPU.

    python tools/train_fashion.py dico-fashion --data dataset-fashion-mnist.deb --output checkpoints

Torch only; not part of the package. The objective is DiT's: noise prediction over 1000 linear betas, plus the
variational bound of the learned variance with the mean held fixed (arXiv 2102.09672). Ternary layers are trained by
straight-through rounding of master weights and written packed. Writes the averaged weights, ``NAME.safetensors``, with
``NAME.json`` beside them: data, seed, steps and losses. A killed run goes on from its last state.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.diffusion import decoding_of
from dexport.graphs.terdit import TernaryLinear, ternarise
from dexport.plugins.ternary_matmul.packing import pack

PACKAGE = "dataset-fashion-mnist"
FOLDER = "usr/share/datasets/fashion-mnist"
SIDE = 32
TRAINED_STEPS = 1000
LABEL_DROPOUT = 0.1
WARMUP = 200
SAVE_EVERY = 500
LOSS_WINDOW = 100


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.5x for DiCo, little for the others")
    train(parser.parse_args())


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of :func:`fit` and :func:`save`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the name of a small recipe")
    parser.add_argument("--data", type=Path, required=True, help=f"Debian's {PACKAGE} package, or its unpacked root")
    parser.add_argument("--output", type=Path, default=Path("checkpoints"))
    parser.add_argument("--state", type=Path, default=Path("out/training"), help="folder of resumable states")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    recipe = find_recipe(args.recipe)
    model = initialise(recipe.constructor(**recipe.config))
    ternary = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TernaryLinear)]
    images, labels, digest = load_fashion(args.data)
    tiles = decoding_of(recipe.sampling.decoder, 1.0).tiles
    images = thumbnails(images, tiles)
    null_label = recipe.config["num_classes"]
    objective = Objective(torch.linspace(1e-4, 2e-2, TRAINED_STEPS, dtype=torch.float64))
    network = torch.compile(model) if args.compile else model

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, float]:
        y = dropped(labels[rows], null_label, rng)
        return objective(lambda x, t: network(x, t, y), images[rows], rng)

    average, run = fit(args, model, loss, len(images))
    for name in ternary:
        average[name] = pack(ternarise(average[name]))
    preparation = "28 px padded to 32 with black, [-1, 1], " + (
        f"rearranged as {tiles}x{tiles} thumbnails, " if tiles > 1 else ""
    )
    record = {
        "data": {"package": PACKAGE, "split": "train", "images": len(images), "sha256": digest},
        "preparation": preparation + "pixel-unshuffled to (4, 16, 16)",
        "objective": "epsilon MSE + variational bound of the learned variance, 1000 linear betas 1e-4..2e-2",
        "label_dropout": LABEL_DROPOUT,
    }
    save(args, average, record | run)


Loss = Callable[[Tensor, torch.Generator], tuple[Tensor, float]]
"""Of rows of the data: what is minimised, and the figure to report."""


def fit(args: argparse.Namespace, model: nn.Module, loss: Loss, count: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights, and what to record of the run.

    Args:
        count: rows of the data. Rows and all other draws of a step depend on the seed and the step only.
    """
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    args.state.mkdir(parents=True, exist_ok=True)
    state_path = args.state / f"{args.recipe}.pt"
    first, seconds, curve = 0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, first, seconds, curve = state["average"], state["step"], state["seconds"], state["curve"]

    started, window = time.monotonic() - seconds, []
    for step in range(first, args.steps):
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(count, (args.batch,), generator=rng)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        value, reported = loss(rows, rng)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        follow(average, model, min(args.ema, (1 + step) / (10 + step)))
        window.append(reported)
        if (step + 1) % LOSS_WINDOW == 0:
            curve.append([step + 1, round(sum(window) / len(window), 5)])
            window.clear()
            seconds = time.monotonic() - started
            rate = (step + 1) * args.batch / seconds
            print(f"{args.recipe} step {step + 1}/{args.steps} loss {curve[-1][1]:.4f} {rate:.0f} images/s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": step + 1,
                    "seconds": time.monotonic() - started,
                    "curve": curve,
                },
                state_path.with_suffix(".new"),
            )
            state_path.with_suffix(".new").replace(state_path)
    run = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.lr,
        "average_decay": args.ema,
        "seed": args.seed,
        "threads": args.threads,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "torch": torch.__version__,
        "loss_by_step": curve,
    }
    return average, run


def save(args: argparse.Namespace, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
    """The weights of a recipe and the record beside them."""
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        args.output / f"{args.recipe}.safetensors",
        metadata={"recipe": args.recipe, "data": PACKAGE, "steps": str(args.steps), "seed": str(args.seed)},
    )
    text = json.dumps({"recipe": args.recipe, **record}, indent=1) + "\n"
    (args.output / f"{args.recipe}.json").write_text(text, encoding="utf-8")


def dropped(labels: Tensor, null_label: int, rng: torch.Generator) -> Tensor:
    """Labels, some of them replaced by the null label."""
    return labels.masked_fill(torch.rand(len(labels), generator=rng) < LABEL_DROPOUT, null_label)


def initialise(model: nn.Module) -> nn.Module:
    """DiT's initialisation: xavier for matrices, small embeddings, zero modulation and zero output.

    Ternary layers get master weights, which the forward pass rounds.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            zero = "adaLN_modulation" in name or name in ("final_layer.linear", "final_layer.out_proj")
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, TernaryLinear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.constant_(module.alphas, module.weight.abs().mean().item())
            module.forward = straight_through.__get__(module)
        elif isinstance(module, nn.RMSNorm) and "adaLN_modulation" in name:
            nn.init.zeros_(module.weight)
    for name, parameter in model.named_parameters():
        if "t_embedder" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
    return model


def straight_through(layer: TernaryLinear, x: Tensor) -> Tensor:
    """The layer with master weights: ternary forwards, their gradient unchanged backwards."""
    ternary = layer.weight + (ternarise(layer.weight) - layer.weight).detach()
    return F.linear(x, ternary * layer.alphas, layer.bias)


class Objective:
    """Loss of a batch: epsilon MSE, and the bound that trains the variance channels."""

    def __init__(self, betas: Tensor) -> None:
        alphas_cumprod = (1 - betas).cumprod(0)
        previous = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        self.steps = len(betas)
        self.signal, self.noise = alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()
        self.largest = betas.log().float()
        self.smallest = torch.cat([variance[1:2], variance[1:]]).log().float()
        # Posterior mean = a x_0 + b x_t, so a difference in epsilon moves it by a * noise / signal.
        self.mean_per_epsilon = (
            betas * previous.sqrt() / (1 - alphas_cumprod) * (1 - alphas_cumprod).sqrt() / alphas_cumprod.sqrt()
        ).float()

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], x: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, float]:
        """x (B, C, ...); the model takes the noisy x and t (B,) and gives (B, 2C, ...)."""
        t = torch.randint(self.steps, (len(x),), generator=rng)
        eps = torch.randn(x.shape, generator=rng)

        def at(table: Tensor) -> Tensor:
            return table[t].reshape(-1, *[1] * (x.dim() - 1))

        noisy = at(self.signal) * x + at(self.noise) * eps
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted, v = model(noisy, t.float()).float().chunk(2, dim=1)
        mse = F.mse_loss(predicted, eps)
        fraction = (v + 1) / 2
        log_variance = fraction * at(self.largest) + (1 - fraction) * at(self.smallest)
        distance = (at(self.mean_per_epsilon) * (predicted.detach() - eps)).square()
        true = at(self.smallest)
        kl = 0.5 * (log_variance - true + ((true - log_variance).exp() - 1) + distance * (-log_variance).exp())
        return mse + kl[t > 0].mean() / math.log(2), mse.item()


def thumbnails(latents: Tensor, tiles: int) -> Tensor:
    """The pictures as sheets of tiles x tiles thumbnails: what a decoder with tiles undoes."""
    pixels = F.pixel_shuffle(latents, 2).unflatten(3, (-1, tiles)).unflatten(2, (-1, tiles))
    return F.pixel_unshuffle(pixels.permute(0, 1, 3, 2, 5, 4).reshape(-1, 1, SIDE, SIDE), 2).contiguous()


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def follow(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)


def load_fashion(path: Path, split: str = "train") -> tuple[Tensor, Tensor, str]:
    """Images (N, 4, 16, 16) float32 in [-1, 1], labels (N,) int64, and the sha256 of the image file."""
    with unpacked(path) as root:
        images_file = (root / FOLDER / f"{split}-images-idx3-ubyte.gz").read_bytes()
        labels_file = (root / FOLDER / f"{split}-labels-idx1-ubyte.gz").read_bytes()
    pixels = np.frombuffer(gzip.decompress(images_file), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(gzip.decompress(labels_file), np.uint8, offset=8)
    padded = F.pad(torch.from_numpy(pixels.copy()).float() / 127.5 - 1, [(SIDE - 28) // 2] * 4, value=-1.0)
    return F.pixel_unshuffle(padded, 2), torch.from_numpy(labels.copy()).long(), hashlib.sha256(images_file).hexdigest()


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The root of a Debian package, unpacked to a temporary folder where it is a file."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(path), folder], check=True)
        yield Path(folder)


if __name__ == "__main__":
    main()
