"""ReCAP (arXiv 2505.19089): which steps of a masked generator are full passes, and which light ones follow each.

A full pass fixes which places its whole group decides, and keeps what its blocks attended to; a light pass evaluates
the places of the group only. Source: ``cache_decoding.py`` of liebenxj/ReCAP at 4d1da38.
"""

from __future__ import annotations

import re

from dexport.errors import UsageError
from dexport.limits import shown

RECAP = re.compile(r"([0-9]{1,5}):([0-9]{1,5})")


def recap_of(text: str) -> tuple[int, int]:
    """Steps before the first group, and light passes after each full one then, of ``PRE_FULL:NUM_CACHE``.

    Raises:
        UsageError: it is something else.
    """
    match = RECAP.fullmatch(text)
    if match is None:
        raise UsageError(
            f"recap {shown(text)} is not PRE_FULL:NUM_CACHE",
            hint="for example 12:1: twelve full steps, then one light pass after each full one",
        )
    return int(match[1]), int(match[2])


def groups_of(steps: int, recap: str) -> list[range]:
    """The steps of each group in order, the first of which is a full pass; groups of one step where ``recap`` is empty.

    The last group may be shorter. The official code skips steps where a group has more than one light pass, which its
    scripts never do; this does not.
    """
    before, light = recap_of(recap) if recap else (steps, 0)
    single = [range(step, step + 1) for step in range(min(before, steps))]
    return single + [range(first, min(first + 1 + light, steps)) for first in range(len(single), steps, 1 + light)]
