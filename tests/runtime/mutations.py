"""Mutated inputs of the runtime, for tests and fuzzers: ``(rng, folder)``; all but a DexportError is a finding."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from random import Random

from dexport.errors import DexportError
from dexport.runtime.gallery import SETTINGS, Gallery
from tools.mutate import changed, damaged

RUN = {"bundle": "small", "seed": 0, "labels": [1, 2, 3], "fractions": [], "cfg": 1.5}


def read_mutated_record(rng: Random, folder: Path) -> None:
    """A folder of samples whose ``run.json`` was changed: it is taken over or refused, and what is not its stays."""
    gallery = folder / "gallery"
    shutil.rmtree(gallery, ignore_errors=True)
    gallery.mkdir()
    text = json.dumps(RUN).encode()
    mutated = damaged(rng, text) if rng.random() < 0.5 else json.dumps(changed(rng, RUN)).encode()
    (gallery / SETTINGS).write_bytes(mutated)
    (gallery / "2024-holiday.png").write_text("mine")
    (folder / "victim.png").write_text("mine")
    with contextlib.suppress(DexportError):
        assert Gallery(gallery, RUN, [""] * 3, force=rng.random() < 0.5).missing() == [0, 1, 2]
    assert (gallery / "2024-holiday.png").read_text() == (folder / "victim.png").read_text() == "mine"
