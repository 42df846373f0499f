"""Train the small masked generators of ``dexport/exporter/recipes/fashion_masked.py`` on Fashion-MNIST, on a CPU.

    python tools/train_masked.py mage-vqgan-fashion --data dataset-fashion-mnist.deb --lr 1e-3
    python tools/train_masked.py maskgit-r-fashion --data dataset-fashion-mnist.deb
    python tools/train_masked.py mar-fashion --data dataset-fashion-mnist.deb

The tokenizer first: the second one draws its ids. Written and resumed as by ``train_fashion.py``. Objectives: a VQ-VAE
with straight-through codes and without a discriminator (arXiv 1711.00937); cross-entropy of masked ids at the cosine
of a uniform number (MaskGIT, arXiv 2202.04200); the noise and the variance of the tokens that MAR masks
(arXiv 2406.11838), over 4 x 4 pixels each.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_fashion import (
    LABEL_DROPOUT,
    PACKAGE,
    TRAINED_STEPS,
    Objective,
    argument_parser,
    dropped,
    fit,
    load_fashion,
    save,
)

from dexport.exporter.recipes import find_recipe

TOKENIZER = "mage-vqgan-fashion"
COMMITMENT = 0.25
RESTART_EVERY, RESTART_UNTIL = 50, 0.6
"""Codes that no place took for so many steps move to a place, in this share of the training."""
TIMES_PER_TOKEN = 4
SMALLEST_MASK = 0.7


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    latents, labels, digest = load_fashion(args.data)
    pixels = F.pixel_shuffle(latents, 2)
    kinds = {TOKENIZER: tokenizer, "maskgit-r-fashion": maskgit, "mar-fashion": mar}
    record = {"data": {"package": PACKAGE, "split": "train", "images": len(pixels), "sha256": digest}}
    weights, more = kinds[args.recipe](args, pixels, labels)
    save(args, {name: value.half() for name, value in weights.items()}, record | more)  # half the size


Trained = tuple[dict[str, Tensor], dict[str, Any]]


class Tokenizer(nn.Module):
    """Both halves of the VQGAN over one codebook, named as in official files."""

    def __init__(self) -> None:
        super().__init__()
        encoder, decoder = (find_recipe(f"{TOKENIZER}-{half}") for half in ("encoder", "decoder"))
        whole = encoder.constructor(**encoder.config)
        self.encoder, self.quantize = whole.encoder, whole.quantize
        self.decoder = decoder.constructor(**decoder.config).decoder
        nn.init.normal_(self.quantize.embedding.weight, std=0.1)


def tokenizer(args: argparse.Namespace, pixels: Tensor, _: Tensor) -> Trained:
    model, pixels = Tokenizer(), (pixels + 1) / 2
    codes = model.quantize.embedding
    used, steps = torch.zeros(codes.num_embeddings), [0]

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, float]:
        x = pixels[rows]
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encoder(x)
        z = z.float().flatten(2).transpose(1, 2)
        with torch.no_grad():
            ids = model.quantize(z)
            used.scatter_add_(0, ids.flatten(), torch.ones(ids.numel()))
            steps[0] += 1
            if steps[0] == 1 or steps[0] % RESTART_EVERY == 0:
                if steps[0] < RESTART_UNTIL * args.steps:
                    idle = (used < 1).nonzero().flatten() if steps[0] > 1 else torch.arange(len(used))
                    places = torch.randint(z.shape[0] * z.shape[1], (len(idle),), generator=rng)
                    codes.weight[idle] = z.flatten(0, 1)[places]
                    ids = model.quantize(z)
                used.zero_()
        nearest = codes(ids)
        straight = (z + (nearest - z).detach()).transpose(1, 2).unflatten(2, (8, 8))
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.decoder(straight)
        error = F.mse_loss(drawn.float(), x)
        kept = F.mse_loss(nearest, z.detach()) + COMMITMENT * F.mse_loss(z, nearest.detach())
        return 10 * error + F.l1_loss(drawn.float(), x) + kept, error.item()

    average, run = fit(args, model, loss, len(pixels))
    more = {
        "preparation": "28 px padded to 32 with black, [0, 1]",
        "objective": f"10 MSE + L1 + codebook + {COMMITMENT} commitment, straight through; idle codes restarted",
    }
    return average, more | run


def maskgit(args: argparse.Namespace, pixels: Tensor, labels: Tensor) -> Trained:
    recipe, encoder = find_recipe(args.recipe), find_recipe(f"{TOKENIZER}-encoder")
    half = encoder.constructor(**encoder.config).eval()
    half.load_state_dict(load_file(args.output / f"{TOKENIZER}.safetensors"), strict=False)
    with torch.no_grad():
        ids = torch.cat([half((part + 1) / 2) for part in pixels.split(256)])
    model = initialise(recipe.constructor(**recipe.config))
    mask_id, null_label = recipe.config["codebook_size"], recipe.config["num_classes"] - 1

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, float]:
        own = ids[rows]
        share = torch.cos(torch.rand(len(rows), 1, generator=rng) * math.pi / 2)
        masked = ranks(own.shape, rng) < (share * own.shape[1]).ceil().clamp(min=1)
        y = dropped(labels[rows], null_label, rng)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(own.masked_fill(masked, mask_id), y.unsqueeze(1))
        entropy = F.cross_entropy(logits.float()[masked], own[masked])
        return entropy, entropy.item()

    average, run = fit(args, model, loss, len(ids))
    more = {
        "preparation": f"28 px padded to 32 with black, ids of {TOKENIZER}",
        "objective": "cross-entropy of masked ids, their share the cosine of a uniform number",
        "label_dropout": LABEL_DROPOUT,
    }
    return average, more | run


def mar(args: argparse.Namespace, pixels: Tensor, labels: Tensor) -> Trained:
    recipe = find_recipe(args.recipe)
    model = initialise(recipe.constructor(**recipe.config))
    for name, parameter in model.diffloss.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            nn.init.zeros_(parameter)
    tokens = F.pixel_unshuffle(pixels, 4).flatten(2).transpose(1, 2).contiguous()
    null_label = recipe.config["class_num"]
    objective = Objective(cosine())

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, float]:
        own = tokens[rows]
        # MAR's: a normal distribution around 1, cut off at 0.7 and 1.
        share = 1 - 0.25 * torch.randn(64, generator=rng).abs()
        share = share[share >= SMALLEST_MASK][0].item()
        masked = ranks(own.shape[:2], rng) < math.ceil(share * own.shape[1])
        y = dropped(labels[rows], null_label, rng)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            z = model(own, masked.float(), y)[masked].float().repeat(TIMES_PER_TOKEN, 1)
        return objective(lambda x, t: model.diffloss.net(x, t, z), own[masked].repeat(TIMES_PER_TOKEN, 1), rng)

    average, run = fit(args, model, loss, len(tokens))
    more = {
        "preparation": "28 px padded to 32 with black, [-1, 1], 4 x 4 pixels a token",
        "objective": "noise MSE of masked tokens + variational bound of the learned variance, 1000 cosine betas",
        "label_dropout": LABEL_DROPOUT,
    }
    return average, more | run


def ranks(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A random order (B, N) of the tokens of each row."""
    return torch.rand(shape, generator=rng).argsort(1).argsort(1)


def cosine() -> Tensor:
    """Betas (1000,): the cosine schedule of arXiv 2102.09672."""
    left = [math.cos((t / TRAINED_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(TRAINED_STEPS + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(left)], dtype=torch.float64)


def initialise(model: nn.Module) -> nn.Module:
    """Xavier for matrices, normal numbers for tables and positions, as officially."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and name != "bias":
                    nn.init.normal_(parameter, std=0.02)
    return model


if __name__ == "__main__":
    main()
