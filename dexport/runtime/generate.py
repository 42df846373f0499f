"""What ``dexport sample`` does: pictures of a bundle in a folder, and their grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dexport.bundle import Bundle
from dexport.errors import UsageError, free_name
from dexport.limits import check_pictures
from dexport.places import check_place
from dexport.runtime.gallery import open_gallery
from dexport.runtime.noise import Noise
from dexport.runtime.pipeline import Pipeline
from dexport.runtime.samplers import Sampler

DEFAULT_CLASSES = 10


@dataclass(frozen=True)
class Generated:
    """What a run made.

    Attributes:
        grid, folder: the picture of all samples, and the folder that holds each of them.
        settings: what fixes every picture, as the folder records it.
        made, kept: pictures made now, and those that were there already.
        seconds: for those made now.
        runner: what ran.
        caveats: what the bundle is not, such as trained or verified; see :attr:`dexport.bundle.Bundle.caveats`.
        set_aside: files of others that lay where pictures go, by their new names in ``folder``.
    """

    grid: Path
    folder: Path
    settings: dict[str, Any]
    made: int
    kept: int
    seconds: float
    runner: str
    caveats: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


def check_request(
    bundle: Bundle,
    output: Path,
    *,
    classes: Sequence[int] = (),
    count: int = 1,
    sampler: str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    batch: int = 8,
    fractions: Sequence[float] = (),
) -> None:
    """Refuse what :func:`generate` would refuse, before a network is loaded.

    Raises:
        UsageError: anything that the model, the sampler or the guidance does not have; a place that cannot be written.
        InputError: an incomplete manifest.
    """
    _plan(Pipeline.unopened(bundle), output, classes, count, sampler, steps, cfg_scale, seed, batch, fractions)


def _plan(
    pipeline: Pipeline,
    output: Path,
    classes: Sequence[int],
    count: int,
    sampler: str | None,
    steps: int | None,
    cfg_scale: float | None,
    seed: int,
    batch: int,
    fractions: Sequence[float],
) -> tuple[list[int | None], Sampler]:
    """One label per picture, and the sampler; all that can be refused is."""
    if output.suffix.lower() != ".png":
        raise UsageError(
            f"-o {output} is not a PNG file", hint=f"for example -o {free_name(output.with_suffix('.png'))}"
        )
    check_place(output)
    if count < 1 or batch < 1:
        raise UsageError(f"--count {count}, --batch {batch}: both start at 1", hint="give 1 or more")
    chosen = _classes(pipeline, classes)
    check_pictures(len(chosen), count)
    labels = [label for label in chosen for _ in range(count)]
    plan = pipeline.sampler(sampler, steps)
    pipeline.denoiser([label for label in labels if label is not None], cfg_scale, fractions, plan)
    Noise(seed, images=[0])
    return labels, plan


def generate(
    pipeline: Pipeline,
    output: Path,
    *,
    classes: Sequence[int] = (),
    count: int = 1,
    sampler: str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    batch: int = 8,
    fractions: Sequence[float] = (),
    force: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _detail: None,
) -> Generated:
    """Sample ``count`` pictures of each class and draw the grid.

    A run that was interrupted goes on with the pictures that are missing: each has its own noise, so they are the same
    whichever are made together.

    Args:
        output: PNG file of the grid; the pictures go to a folder named after it.
        classes: labels; by default the first few. An unconditional network takes none.

    Raises:
        UsageError: anything that the model, the sampler or the guidance does not have, before any work.
    """
    labels, plan = _plan(pipeline, output, classes, count, sampler, steps, cfg_scale, seed, batch, fractions)
    settings = {
        "bundle": pipeline.bundle.manifest["name"],
        "files": {name: entry["sha256"] for name, entry in pipeline.bundle.manifest["files"].items()},
        "runner": pipeline.runner,
        "sampler": sampler or pipeline.facts["sampler"],
        "steps": pipeline.facts["steps"] if steps is None else steps,
        "cfg": pipeline.default_scale if cfg_scale is None else cfg_scale,
        "fractions": list(fractions or pipeline.fractions),
        "seed": seed,
        "labels": labels,
    }
    captions = [_caption(pipeline, label) for label in labels]
    folder = output.with_name(f"{output.stem}-images")
    batch = min(batch, pipeline.largest_batch(cfg_scale) or batch)
    with open_gallery(folder, settings, captions, force=force) as gallery:
        missing = gallery.missing()
        started = time.perf_counter()
        for first in range(0, len(missing), batch):
            numbers = missing[first : first + batch]
            on_progress(first, len(missing), f"{first} of {len(missing)} images")
            latents = pipeline.sample(
                [label for label in (labels[number] for number in numbers) if label is not None],
                Noise(seed, images=numbers),
                sampler=plan,
                cfg_scale=cfg_scale,
                fractions=fractions,
            )
            for number, image in zip(numbers, pipeline.images(latents), strict=True):
                gallery.add(number, image)
        seconds = time.perf_counter() - started
        gallery.write_grid(output, columns=count if count > 1 else None)
    kept = len(labels) - len(missing)
    return Generated(
        grid=output,
        folder=folder,
        settings=settings,
        made=len(missing),
        kept=kept,
        seconds=round(seconds, 2),
        runner=pipeline.runner,
        caveats=pipeline.bundle.caveats,
        set_aside=gallery.set_aside,
    )


def _classes(pipeline: Pipeline, classes: Sequence[int]) -> Sequence[int | None]:
    if pipeline.classes is None:
        if classes:
            raise UsageError(
                f"{pipeline.bundle.manifest['name']} is unconditional and has no classes", hint="leave out --classes"
            )
        return [None]
    return classes or range(min(DEFAULT_CLASSES, pipeline.classes))


def _caption(pipeline: Pipeline, label: int | None) -> str:
    if label is None:
        return ""
    names = pipeline.facts["class_names"]
    return names[label] if names else f"class {label}"
