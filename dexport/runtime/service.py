"""Many small requests for pictures as few batches: what a server needs around a pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dexport.errors import DexportError, UsageError
from dexport.limits import MOST_STEPS_SERVED
from dexport.runtime.noise import Noise
from dexport.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Picture:
    """One picture to make.

    Attributes:
        label: its class; None for an unconditional network.
        seed: the same label, seed, scale and steps give the same picture, the first one of ``dexport sample``.
        cfg_scale, steps: None for the system's own.
    """

    label: int | None
    seed: int
    cfg_scale: float | None = None
    steps: int | None = None


def make_pictures(
    pipeline: Pipeline, requests: Sequence[Sequence[Picture]], batch: int
) -> list[np.ndarray | DexportError]:
    """Answer several requests together.

    Pictures with the same guidance scale and steps share batches, whichever request they are from.

    Args:
        batch: most pictures that are made at once.

    Returns:
        Per request (N, H, W, C) uint8, or what is wrong with it; the others are answered all the same.
    """
    answers: list[np.ndarray | DexportError | None] = [_refusal(pipeline, pictures) for pictures in requests]
    groups: dict[tuple[float | None, int | None], list[tuple[int, int]]] = defaultdict(list)
    for index, pictures in enumerate(requests):
        if answers[index] is None:
            for row, picture in enumerate(pictures):
                groups[picture.cfg_scale, picture.steps].append((index, row))
    made: dict[tuple[int, int], np.ndarray] = {}
    for (cfg_scale, steps), places in groups.items():
        size = max(1, min(batch, pipeline.largest_batch(cfg_scale) or batch))
        for first in range(0, len(places), size):
            chunk = places[first : first + size]
            try:
                images = _sample(pipeline, [requests[index][row] for index, row in chunk], cfg_scale, steps)
            except DexportError as error:
                for index, _ in chunk:
                    answers[index] = error
            else:
                made.update(zip(chunk, images, strict=True))
    return [
        np.stack([made[index, row] for row in range(len(pictures))]) if answer is None else answer
        for index, (pictures, answer) in enumerate(zip(requests, answers, strict=True))
    ]


def _sample(pipeline: Pipeline, pictures: Sequence[Picture], cfg_scale: float | None, steps: int | None) -> np.ndarray:
    labels = [picture.label for picture in pictures if picture.label is not None]
    noise = Noise.of_seeds([picture.seed for picture in pictures])
    latents = pipeline.sample(labels, noise, sampler=pipeline.sampler(steps=steps), cfg_scale=cfg_scale)
    return pipeline.images(latents)


def _refusal(pipeline: Pipeline, pictures: Sequence[Picture]) -> DexportError | None:
    """What is wrong with a request."""
    try:
        if not pictures:
            raise UsageError("a request for no pictures", hint="ask for one or more")
        for picture in pictures:
            if (picture.label is None) != (pipeline.classes is None):
                raise UsageError("labels go with models that have classes, and only with them")
            if picture.steps is not None and not 1 <= picture.steps <= MOST_STEPS_SERVED:
                raise UsageError(f"{picture.steps} steps", hint=f"ask for 1 to {MOST_STEPS_SERVED}")
            Noise.of_seeds([picture.seed])
            sampler = pipeline.sampler(steps=picture.steps)
            labels = [] if picture.label is None else [picture.label]
            pipeline.denoiser(labels, picture.cfg_scale, sampler=sampler)
    except DexportError as error:
        return error
    return None
