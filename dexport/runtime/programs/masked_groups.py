"""The orders of MAGE and of MaskGIT-r, in which one full pass may decide the places of several steps (ReCAP).

Sources: LTH14/mage ``gen_img_uncond.py`` at 1becb14; liebenxj/ReCAP ``examples/MaskGIT+ReCAP/cache_decoding.py`` at
4d1da38. MAGE with ReCAP is an own reading of arXiv 2505.19089, which has figures for it but no code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from dexport.errors import UsageError
from dexport.runtime.draws import Draws, choose
from dexport.runtime.guidance import UNGUIDED
from dexport.runtime.programs.masked_orders import (
    FULL,
    Decisions,
    Ids,
    Prediction,
    Run,
    Transformer,
    go_on,
    probabilities,
)
from dexport.runtime.programs.recap import groups_of

SLOWLY = 2.5
"""MaskGIT-r: the share of unknown places is 1 - t**SLOWLY at time t from 0 to 1."""


def mage_counts(steps: int, places: int) -> np.ndarray:
    """Places that each step decides (steps,) int64: what is left follows a cosine, and is one less at least.

    The official loop keeps one place unknown after the last step as well, and gives the code that it drew there.
    """
    left = [places]
    for step in range(steps):
        share = math.cos(math.pi / 2 * ((step + 1) / steps))
        left.append(max(1, min(left[-1] - 1, math.floor(places * share))))
    left[-1] = 0
    return -np.diff(left)


def maskgit_r_counts(steps: int, places: int) -> np.ndarray:
    """Places that each step decides (steps,) int64: differences of floor(places * (1 - t**2.5)), one at least.

    What that costs is taken from the last step; and where it has no more, which the official code refuses, from the
    largest one.

    Raises:
        UsageError: there are more steps than places.
    """
    if steps > places:
        raise UsageError(f"{steps} steps are too many for {places} places", hint=f"give --steps {places} or less")
    left = np.floor((1 - np.linspace(0, 1, steps + 1)[:-1] ** SLOWLY) * places).astype(np.int64)
    counts = -np.diff([*left, 0])
    none = counts == 0
    counts[-1] -= none.sum()
    counts[none] = 1
    while counts[-1] < 1:
        counts[counts.argmax()] -= 1
        counts[-1] += 1
    return counts


COUNTS: Mapping[str, Callable[[int, int], np.ndarray]] = {"mage": mage_counts, "maskgit-r": maskgit_r_counts}
"""``(steps, places)`` to the places that each step decides, by order."""


def largest_group(settings: Decisions, places: int) -> int:
    """The places of the largest group that has light passes; 0 where there is none."""
    counts = COUNTS[settings.order](settings.steps, places)
    groups = groups_of(settings.steps, settings.recap)
    return max((int(counts[group.start : group.stop].sum()) for group in groups if len(group) > 1), default=0)


def mage(settings: Decisions, transformer: Transformer, grid: tuple[int, int], draws: Draws) -> Ids:
    """Ids of all unknown places are drawn; those least sure become the mask again, with noise that fades.

    Draws per full pass: a choice and a Gumbel number (B, N) of every place; per light pass a choice (B, n) of the n
    places of its group. With groups, the full pass chooses the places of the whole group, the surest first, with the
    noise of its last step, and the first of them keep the ids that it drew: an own reading, see the module.
    """
    steps, places = settings.steps, math.prod(grid)
    ids = np.full((transformer.count, places), settings.mask, np.int64)
    known = np.cumsum(mage_counts(steps, places))
    for group in groups_of(steps, settings.recap):
        passes = _Passes(settings, transformer, group, known / places)
        full = passes.full(ids)
        numbers, noise = draws.choices(ids.shape), draws.gumbel(ids.shape)
        drawn, sure = _drawn(full, settings.codes, numbers)
        unknown, fading = ids == settings.mask, settings.choice_temperature * (1 - group.stop / steps)
        drawn = np.where(unknown, drawn, ids)
        sure = np.where(unknown, sure, np.float32(np.inf)) + _faded(noise, fading)
        if len(group) == 1:
            ids = np.where(_least(sure, places - known[group.start]), settings.mask, drawn)
            ids = yield from go_on(ids)
            continue
        before = known[group.start - 1] if group.start else 0
        ends = known[group.start : group.stop] - before
        chosen, start = _surest(np.where(unknown, sure, np.float32(-np.inf)), ends[-1]), 0
        drawn = np.take_along_axis(drawn, chosen, axis=1)
        for step, end in zip(group, ends, strict=True):
            if step > group.start:
                light = passes.light(step, ids, chosen)
                drawn, _ = _drawn(light, settings.codes, draws.choices(chosen.shape))
            ids = _placed(ids, chosen[:, start:end], drawn[:, start:end])
            ids, start = (yield from go_on(ids)), end


def maskgit_r(settings: Decisions, transformer: Transformer, grid: tuple[int, int], draws: Draws) -> Ids:
    """The places of a group are the surest ones at temperature 1, with noise that fades; their ids are drawn anew.

    Draws per full pass: a choice and a Gumbel number (B, N) of every place; then for it and for every light pass a
    choice (B, n) of the n places of its group.
    """
    steps, places = settings.steps, math.prod(grid)
    ids = np.full((transformer.count, places), settings.mask, np.int64)
    known, groups = np.cumsum(maskgit_r_counts(steps, places)), groups_of(steps, settings.recap)
    temperatures = sampling_temperatures(settings.sampling_temperature, steps)
    for number, group in enumerate(groups):
        passes = _Passes(settings, transformer, group, known / places)
        full = passes.full(ids)
        numbers, noise = draws.choices(ids.shape), draws.gumbel(ids.shape)
        _, sure = _drawn(full, settings.codes, numbers)
        fading = settings.choice_temperature * (1 - (number + 1) / len(groups))
        sure = np.where(ids == settings.mask, sure, np.float32(-np.inf)) + _faded(noise, fading)
        before = known[group.start - 1] if group.start else 0
        ends = known[group.start : group.stop] - before
        chosen, start = _surest(sure, ends[-1]), 0
        prediction = full.at(chosen)
        for step, end in zip(group, ends, strict=True):
            if step > group.start:
                prediction = passes.light(step, ids, chosen)
            drawn, _ = _drawn(prediction, settings.codes, draws.choices(chosen.shape), temperatures[step])
            ids = _placed(ids, chosen[:, start:end], drawn[:, start:end])
            ids, start = (yield from go_on(ids)), end


class _Passes:
    """The passes of a group: guided in all of its steps where in any, as its memories have one size.

    Args:
        known: (steps,) shares of the places that are known after each step.
    """

    def __init__(self, settings: Decisions, transformer: Transformer, group: range, known: np.ndarray) -> None:
        self._transformer, self._group = transformer, group
        self._scales = [settings.scale_at(step, float(known[step])) for step in group]
        self._full: Prediction | None = None

    def full(self, ids: np.ndarray) -> Prediction:
        """Logits of all places; with memories where light passes follow."""
        guided = any(scale != UNGUIDED for scale in self._scales)
        graph = FULL if len(self._group) > 1 else ""
        self._full = self._transformer(self._scales[0], ids, graph, guided=guided)
        return self._full

    def light(self, step: int, ids: np.ndarray, chosen: np.ndarray) -> Prediction:
        """Logits of the chosen places (B, n); its scale is that of the step before, as in the official loop."""
        assert self._full is not None
        scale = self._scales[step - 1 - self._group.start]
        return self._transformer.light(scale, np.take_along_axis(ids, chosen, axis=1), chosen, self._full)


def _drawn(
    prediction: Prediction, codes: int, numbers: np.ndarray, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (B, n) int64, and the logarithms of their probabilities (B, n) float32.

    Args:
        temperature: what logits are divided by.
    """
    drawn, sure = [], []
    for image, row in enumerate(numbers):
        likely = probabilities(prediction.of(image)[:, :codes] / np.float32(temperature))
        chosen = choose(row, likely)
        with np.errstate(divide="ignore"):  # what cannot be is never chosen, but by a recording
            sure.append(np.log(np.take_along_axis(likely, chosen[:, None], axis=1)[:, 0]).astype(np.float32))
        drawn.append(chosen)
    return np.stack(drawn), np.stack(sure)


def _faded(noise: np.ndarray, fading: float) -> np.ndarray:
    """Rounded once, as the official code makes it in float64."""
    return (fading * noise.astype(np.float64)).astype(np.float32)


def _least(sure: np.ndarray, count: int) -> np.ndarray:
    """(B, N) bool: the ``count`` least sure places of each picture.

    The official loop takes all that are as sure as the last of them; then it goes on with another number of places.
    """
    least = np.zeros(sure.shape, bool)
    np.put_along_axis(least, np.argsort(sure, axis=1, kind="stable")[:, :count], True, axis=1)
    return least


def _surest(sure: np.ndarray, count: int) -> np.ndarray:
    """The surest places (B, count) int64, the surest first."""
    return np.argsort(-sure, axis=1, kind="stable")[:, :count]


def _placed(ids: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The ids with values (B, n) at some places (B, n)."""
    changed = ids.copy()
    np.put_along_axis(changed, places, values, axis=1)
    return changed


def sampling_temperatures(last: float, steps: int) -> np.ndarray:
    """What logits are divided by (steps,) float64: from 1, quickly first."""
    return last + (1 - np.linspace(0, 1, steps) ** 0.5) * (1 - last)


OWN_READINGS = frozenset({"mage"})
"""Orders whose groups are an own reading of the paper."""
IN_GROUPS: Mapping[str, Run] = {"mage": mage, "maskgit-r": maskgit_r}
"""Orders by name."""
