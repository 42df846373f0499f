"""Halton-MaskGIT from the build to the ids, at the goldens' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

import dexport
from dexport.runtime.draws import Replay
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import IDS, Request
from tests.golden import Golden, assert_golden, load_golden

pytestmark = pytest.mark.golden


def build(golden: Golden, config: dict[str, Any], folder: Path, **options: Any) -> Path:
    save_file(golden.weights, folder / "weights.safetensors")
    checkpoint = str(folder / "weights.safetensors")
    dexport.build("halton-maskgit-s", folder / "out", settings=config, checkpoint=checkpoint, profile="ci", **options)
    return folder / "out"


@pytest.mark.parametrize("name", ["halton-transformer", "halton-transformer-s"])
def test_onnx_gives_the_official_logits(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    path = build(golden, golden.config, tmp_path)
    logits = dexport.load(path)(**{key: value.numpy() for key, value in golden.inputs.items()})["logits"]
    assert_golden(logits, golden.outputs["logits"].numpy())


def halton_settings(official: dict[str, Any]) -> dict[str, Any]:
    return {
        "order": "halton",
        "steps": official["step"],
        "cfg_scale": 1.0 + official["w"],
        "temperature_start": float(official["sm_temp_min"]),
        "temperature": float(official["sm_temp_max"]),
        "temperature_power": float(official["temp_pow"]),
        "warmup": official["temp_warmup"],
    }


def confidence_settings(official: dict[str, Any]) -> dict[str, Any]:
    return {
        "order": "confidence",
        "steps": official["step"],
        "cfg_scale": 1.0 + official["w"],
        "temperature": float(official["sm_temp"]),
        "warmup": 0,
        "choice_temperature": official["r_temp"],
        "schedule": official["sched_mode"],
    }


def recorded(golden: Golden) -> list[np.ndarray]:
    """The draws of the official loop, in the order in which the program takes them."""
    draws = []
    for step, ids in enumerate(golden.inputs["sampled_ids"].flatten(2)):
        draws.append(ids.numpy())
        if "gumbel" in golden.inputs:
            draws.append(golden.inputs["gumbel"][step].numpy())
    return draws


def masks(states: Sequence[np.ndarray], mask: int) -> np.ndarray:
    """What the official loops keep of a step: by confidence, what is still unknown; in Halton order, what it wrote."""
    return np.stack(states) == mask


@pytest.mark.parametrize(
    ("name", "settings"), [("halton-halton-loop", halton_settings), ("halton-confidence-loop", confidence_settings)]
)
def test_the_official_loop_is_replayed_through_onnx(name: str, settings: Any, tmp_path: Path) -> None:
    golden = load_golden(name)
    path = build(golden, golden.config["transformer"], tmp_path, parity=False)
    program = OpenProgram.open(path).with_settings(**settings(golden.config["sampler"]))
    labels = tuple(golden.inputs["labels"].tolist())
    steps = list(program.run(Request(len(labels), labels), Replay(recorded(golden))))
    ids = steps[-1].results[IDS]
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, golden.outputs["final_codes"].flatten(1).numpy())
    official = golden.outputs["mask_per_step"].flatten(2).numpy() == 1
    states = [step.state for step in steps]
    unknown = masks(states, golden.config["transformer"]["codebook_size"])
    if name == "halton-confidence-loop":
        np.testing.assert_array_equal(unknown, official)
    else:
        drawn = golden.inputs["sampled_ids"].flatten(2).numpy()
        written = np.full_like(states[0], golden.config["transformer"]["codebook_size"])
        for state, mask, chosen in zip(states, official, drawn, strict=True):
            written = np.where(mask, chosen, written)
            np.testing.assert_array_equal(state, written)
