"""TerDiT's checkpoints: released files hold four values per byte, training files hold master weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dexport
from dexport.errors import InputError
from dexport.exporter.recipes.terdit import RECIPES, adapt
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import load_into, open_weights
from dexport.graphs.terdit import TernaryLinear
from tests.golden import Golden, assert_golden, load_golden, load_keys

FORMS = {"terdit-packed": "packed ternary", "terdit-master": "master weights"}


@pytest.fixture(params=FORMS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def variant_of(golden: Golden) -> Variant:
    return resolve(RECIPES[0], golden.config)


def saved(weights: dict[str, Tensor], folder: Path) -> Path:
    save_file(weights, folder / "terdit.safetensors")
    return folder / "terdit.safetensors"


def test_both_forms_become_ternary_values(golden: Golden, tmp_path: Path) -> None:
    variant = variant_of(golden)
    weights = open_weights(saved(golden.weights, tmp_path), variant.meta_module(), adapt=adapt)
    assert weights.origin.layout in FORMS.values()
    network = load_into(weights, variant.meta_module())
    layers = [layer for layer in network.modules() if isinstance(layer, TernaryLinear)]
    assert layers and all(set(layer.weight.unique().tolist()) <= {-1, 0, 1} for layer in layers)


@pytest.mark.golden
def test_onnx_runtime_gives_the_official_output(golden: Golden, tmp_path: Path) -> None:
    dexport.build(
        "terdit-600m", tmp_path / "out", settings=golden.config, checkpoint=str(saved(golden.weights, tmp_path))
    )
    inputs = {name: golden.inputs[name].numpy() for name in ("x", "t", "y")}
    out = dexport.load(tmp_path / "out")(**{**inputs, "t": inputs["t"].astype(np.float32)})["out"]
    assert_golden(out, golden.outputs["forward"].numpy())


def test_keys_and_packed_shapes_are_the_official_ones() -> None:
    network = resolve(RECIPES[0], {"qk_norm": True}).meta_module()
    ternary = {f"{path}.weight" for path, layer in network.named_modules() if isinstance(layer, TernaryLinear)}
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in ternary:
        shapes[name][0] //= 4
    assert shapes == load_keys("TerDiT-600M-packed")


def test_random_weights_are_ternary() -> None:
    variant = resolve(RECIPES[0], {"dim": 32, "n_layers": 1, "n_heads": 2, "multiple_of": 16})
    weights = open_weights(None, variant.meta_module(), adapt=adapt)
    assert weights.origin.random
    assert set(weights.read("layers.0.attention.wq.weight", torch.float32).unique().tolist()) == {-1, 0, 1}


def test_a_packed_file_with_other_codes_is_refused(tmp_path: Path) -> None:
    golden = load_golden("terdit-packed")
    weights = dict(golden.weights)
    weights["layers.1.attention.wk.weight"] = torch.full_like(weights["layers.1.attention.wk.weight"], 255)
    with pytest.raises(InputError, match=r"layers\.1\.attention\.wk\.weight holds codes that are no ternary values"):
        dexport.build("terdit-600m", tmp_path / "out", settings=golden.config, checkpoint=str(saved(weights, tmp_path)))
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_another_size_is_named(tmp_path: Path) -> None:
    golden = load_golden("terdit-packed")
    weights = {**golden.weights, "layers.0.attention.wq.weight": torch.zeros(3, 64, dtype=torch.uint8)}
    with pytest.raises(InputError, match=r"layers\.0\.attention\.wq\.weight: \[3, 64\]"):
        open_weights(saved(weights, tmp_path), variant_of(golden).meta_module(), adapt=adapt)
