"""Rounding along a calibration: deterministic, resumable, in bounded memory; and builds whose weights are rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import dexport
from dexport.errors import InputError
from dexport.exporter.quantize import rounding
from dexport.exporter.quantize.calibrate import Calibration
from dexport.exporter.quantize.layers import network_layers
from dexport.exporter.quantize.rounding import RoundedWeights, round_weights
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import RandomSource, WeightSource
from tests.bundles import NARROW

VARIANT = resolve(find_recipe("dit-fashion"), NARROW)
LAYERS = network_layers(VARIANT)
SETTINGS = Calibration(images=4, steps=3, batch=2)
WANTED = {
    "blocks.0.attn.qkv": ("ternary",),
    "blocks.0.mlp.fc1": ("int4", "ternary"),
    "blocks.0.adaLN_modulation.1": ("int4",),
}


def run(folder: Path, on_progress=lambda *_: None, source: WeightSource | None = None, **changes) -> RoundedWeights:
    settings = Calibration(**{"images": 4, "steps": 3, "batch": 2, **changes})
    source = source or RandomSource(VARIANT.meta_module(), 0)
    return round_weights(VARIANT, source, settings, WANTED, LAYERS, folder, on_progress)


def arrays(store: RoundedWeights) -> dict[str, np.ndarray]:
    return {
        f"{path}.{scheme}.{name}": getattr(store.load(path, scheme), name).numpy()
        for path, schemes in WANTED.items()
        for scheme in schemes
        for name in ("codes", "scales")
    }


def assert_same(one: RoundedWeights, other: RoundedWeights) -> None:
    a, b = arrays(one), arrays(other)
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RoundedWeights:
    return run(tmp_path_factory.mktemp("rounding") / "rounded")


def test_every_wanted_weight_is_there_and_better_than_the_nearest(whole: RoundedWeights) -> None:
    for path, schemes in WANTED.items():
        for scheme in schemes:
            assert whole.load(path, scheme).codes.shape == LAYERS[path].shape
            errors = whole.errors(path, scheme)
            assert 0 < errors["relative_l2"] < errors["nearest_relative_l2"] < 1
    int4, ternary = (whole.errors("blocks.0.mlp.fc1", scheme)["relative_l2"] for scheme in ("int4", "ternary"))
    assert int4 < ternary / 2


@pytest.mark.parametrize("calls", [2, 4])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(whole: RoundedWeights, calls: int, tmp_path: Path) -> None:
    told: list[str] = []

    def killed(_done: int, _total: int, detail: str) -> None:
        told.append(detail)
        if len(told) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "rounded", killed)
    assert ("images" in told[-1]) == (calls == 2)
    again: list[str] = []
    assert_same(run(tmp_path / "rounded", lambda *told: again.append(told[2])), whole)
    assert sum("images" in detail for detail in again) == {2: 1, 4: 0}[calls]


def test_groups_of_layers_give_what_all_together_give(
    whole: RoundedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "HESSIAN_BYTES", 1)
    told: list[str] = []
    assert_same(run(tmp_path / "rounded", lambda *words: told.append(words[2])), whole)
    assert sum("images 0" in detail for detail in told) == len(WANTED)
    assert not list((tmp_path / "rounded").glob("hessians*"))


def test_what_is_there_is_used_again_but_not_for_another_build(whole: RoundedWeights, tmp_path: Path) -> None:
    run(tmp_path / "rounded", source=RandomSource(VARIANT.meta_module(), 1))
    other = arrays(RoundedWeights(tmp_path / "rounded"))
    assert_same(run(tmp_path / "rounded"), whole)
    assert any(not np.array_equal(other[name], array) for name, array in arrays(whole).items())
    told: list[str] = []
    run(tmp_path / "rounded", lambda *words: told.append(words[2]))
    assert not told
    run(tmp_path / "rounded", lambda *words: told.append(words[2]), seed=1)
    assert told


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rounded").mkdir()
    (tmp_path / "rounded/thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"rounded is in the way"):
        run(tmp_path / "rounded")
    assert (tmp_path / "rounded/thesis.txt").exists()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    store = run(tmp_path / "rounded")
    (tmp_path / "rounded/blocks.0.mlp.fc1.int4.npz").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match=r"holds no rounded weights") as caught:
        store.load("blocks.0.mlp.fc1", "int4")
    assert "rm -r" in caught.value.hint


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    class Exploding(RandomSource):
        def _read(self, name: str) -> Tensor:
            return super()._read(name) * (1e38 if name == "blocks.0.attn.proj.weight" else 1)

    with pytest.raises(InputError, match=r"calibration: blocks.0.mlp.fc1: .* at time 999"):
        run(tmp_path / "rounded", source=Exploding(VARIANT.meta_module(), 0))


DICO = {"hidden_size": 8, "depth": [1, 0, 1, 0, 1]}


@pytest.mark.parametrize(
    ("recipe", "settings", "precision"), [("dit-fashion", NARROW, "fp16"), ("dico-fashion", DICO, "fp32")]
)
def test_a_ternary_build_of_any_backbone(recipe: str, settings: dict, precision: str, tmp_path: Path) -> None:
    options = {"settings": settings, "calibration_images": 4, "precision": precision, "profile": "ci"}
    result = dexport.build(recipe, tmp_path / "out", ternary=True, parity=recipe == "dit-fashion", **options)
    manifest = result.bundle.network.manifest
    schemes = manifest["precision"]["layers"]
    assert {schemes[path] for path in schemes if path.startswith("t_embedder")} == {"float"}
    assert {schemes[path] for path in schemes if "adaLN" in path} == {"int8"}
    assert list(schemes.values()).count("ternary") >= 4
    assert manifest["precision"]["carriers"] == {"ternary": "packed"}
    assert manifest["precision"]["gate"] == "ternary"
    assert result.bundle.network.entry()["ops"]["final"]["DexTernaryMatMul"] == list(schemes.values()).count("ternary")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
