"""Programs of small bundles, and what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dexport.bundle import Bundle, load_bundle
from dexport.runtime.draws import Draws
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import LATENTS, Request

STEPS = 4


def with_session(
    bundle: Bundle | Path, session: Callable[..., Mapping[str, np.ndarray]], decoder: Any = None
) -> OpenProgram:
    """The program of a bundle with one session in place of its denoisers, and one in place of its decoder."""
    bundle = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    return OpenProgram(bundle, open_graph=lambda network, _graph: decoder if network.role == "decoder" else session)


def latents(program: OpenProgram, labels: Sequence[int] = (3, 7), seed: int = 0, **settings: Any) -> np.ndarray:
    """Latents (B, C, H, W) of a few steps, one image per label; of one image without labels."""
    images = range(len(labels) or 1)
    chosen = program.with_settings(**{"steps": STEPS, **settings})
    return chosen.results(Request(len(images), tuple(labels)), Draws(seed, images=images))[LATENTS]
