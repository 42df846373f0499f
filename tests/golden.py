"""Reading golden files: weights, inputs and outputs that the official code produced."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    metadata: dict[str, str]


def load_golden(name: str) -> Golden:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        metadata = file.metadata()

    def group(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Golden(
        json.loads(metadata["config"]), group("weights/"), group("inputs/"), group("outputs/"), dict(metadata)
    )


def load_keys(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDENS / "keys" / f"{name}.json").read_text())
