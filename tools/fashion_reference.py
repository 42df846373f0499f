"""Real Fashion-MNIST images as a reference file: ``.npz`` with ``arr_0`` (N, 32, 32, 1) uint8.

python tools/fashion_reference.py dataset-fashion-mnist.deb -o out/fashion-test.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from train_fashion import load_fashion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Debian's dataset-fashion-mnist package, or its unpacked root")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--split", default="t10k", choices=["train", "t10k"])
    parser.add_argument("--count", type=int, help="the first so many; all by default")
    args = parser.parse_args()
    latents, _, _ = load_fashion(args.data, args.split)
    pixels = F.pixel_shuffle(latents[: args.count], 2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    main()
