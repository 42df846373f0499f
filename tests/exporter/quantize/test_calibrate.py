"""Calibration along the sampling trajectory, and INT8 builds of a small model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import dexport
from dexport.errors import InputError, UsageError
from dexport.exporter.quantize import calibrate as calibration
from dexport.exporter.quantize.calibrate import Calibration, calibrate
from dexport.exporter.quantize.observer import Statistics
from dexport.exporter.recipes import find_recipe
from dexport.exporter.trajectory import TorchNetwork
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import RandomSource
from dexport.runtime.int8_products import multiply_exactly
from tests.bundles import NARROW

VARIANT = resolve(find_recipe("dit-fashion"), NARROW)
SETTINGS = Calibration(images=4, steps=3, batch=2)
LAYERS = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


def weights(seed: int = 0) -> RandomSource:
    return RandomSource(VARIANT.meta_module(), seed)


def run(path: Path, on_progress=lambda *_: None, settings: Calibration = SETTINGS, source=None) -> Statistics:
    return calibrate(VARIANT, source or weights(), settings, LAYERS, path, on_progress)


def arrays(statistics: Statistics) -> dict[str, np.ndarray]:
    return {f"{path}:{n}": a for path, seen in statistics.items() for n, a in seen.input.arrays().items()}


def assert_same(one: Statistics, other: Statistics) -> None:
    a, b = arrays(one), arrays(other)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return run(tmp_path_factory.mktemp("calibration") / "partial.npz")


def test_every_layer_is_seen_at_every_step(whole: Statistics) -> None:
    assert list(whole) == LAYERS
    for seen in whole.values():
        assert sorted(seen.input.ranges) == [0.0, 500.0, 999.0]
        # 4 images, both halves of the guidance, 3 steps, 64 tokens
        assert seen.input.histogram.sum() == 4 * 2 * 3 * 64 * len(seen.input.channel_absmax)
        assert seen.weight_absmax.shape == seen.input.channel_absmax.shape


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(whole: Statistics, tmp_path: Path) -> None:
    started: list[int] = []

    def killed(done: int, _total: int, _detail: str) -> None:
        started.append(done)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "partial.npz", killed)
    assert [path.name for path in tmp_path.iterdir()] == ["partial.npz"]
    resumed = run(tmp_path / "partial.npz", lambda done, *_: started.append(done))
    assert started == [0, 1, 1, 2]
    assert_same(whole, resumed)


def test_statistics_of_another_build_are_not_used(whole: Statistics, tmp_path: Path) -> None:
    run(tmp_path / "partial.npz", source=weights(seed=1))
    assert_same(whole, run(tmp_path / "partial.npz"))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "partial.npz").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match=r"holds no calibration") as error:
        run(tmp_path / "partial.npz")
    assert "rm " in error.value.hint


def test_classes_are_mixed_and_both_halves_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[list[int]] = []

    class Spy(TorchNetwork):
        def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            labels.append(inputs["y"].tolist())
            return super().__call__(graph, **inputs)

    monkeypatch.setattr(calibration, "TorchNetwork", Spy)
    run(tmp_path / "partial.npz")
    assert labels == [[0, 2, 10, 10]] * 3 + [[5, 7, 10, 10]] * 3


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    class Exploding(RandomSource):
        def _read(self, name: str) -> Tensor:
            return super()._read(name) * (1e38 if name == "blocks.0.mlp.fc1.weight" else 1)

    with pytest.raises(InputError, match=r"calibration: blocks.0.mlp.fc2: .* NaN or infinite at time 999"):
        run(tmp_path / "partial.npz", source=Exploding(VARIANT.meta_module(), 0))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("field", "value"), [("images", 3), ("seed", -1), ("method", "entropy")])
def test_bad_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError):
        Calibration(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": "w8a8", "calibration_images": 3}, "3 calibration images are too few"),
        ({"int8": "weight", "calibration_seed": 1}, "need a calibration"),
        ({"int8": "w4"}, "no INT8 scheme 'w4'"),
    ],
)
def test_bad_options_are_refused_before_work_starts(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dexport.build("dit-fashion", tmp_path / "out", settings=NARROW, **options)
    assert not any(tmp_path.iterdir())


def test_another_version_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    key = calibration.calibration_key(VARIANT, weights(), SETTINGS, LAYERS)
    assert calibration.calibration_key(VARIANT, weights(), SETTINGS, LAYERS) == key
    monkeypatch.setattr(calibration, "__version__", "99.0")
    assert calibration.calibration_key(VARIANT, weights(), SETTINGS, LAYERS) != key


def test_a_network_that_is_not_sampled_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no trajectory to calibrate on"):
        dexport.build("sd-vae-decoder", tmp_path / "out", int8="w8a8")


DICO = {"hidden_size": 8, "depth": [1, 0, 1, 0, 1]}


# Random weights let the state of a trajectory grow a hundredfold. DiT normalises it before every layer that is
# quantised, DiCo does not, and a range of hundreds does not fit the gate's inputs of about 1.
@pytest.mark.parametrize(
    ("recipe", "settings", "parity"), [("dit-fashion", NARROW, True), ("dico-fashion", DICO, False)]
)
def test_a_w8a8_build_runs_integer_kernels(recipe: str, settings: dict, parity: bool, tmp_path: Path) -> None:
    options = {"settings": settings, "int8": "w8a8", "calibration_images": 4, "parity": parity}
    result = dexport.build(recipe, tmp_path / "out", **options, profile="ci")
    manifest = result.bundle.network.manifest
    assert result.status == manifest["status"] == ("passed" if parity else "not verified")
    assert not (tmp_path / "out.calibration.npz").exists()
    assert manifest["precision"]["calibration"]["images"] == 4
    schemes = {path: scheme for path, scheme in manifest["precision"]["layers"].items() if scheme != "float"}
    assert set(schemes.values()) == {"w8a8"}
    report = json.loads((tmp_path / "out/reports/calibration.json").read_text())
    smoothed = set(manifest["precision"]["smoothed"])
    assert smoothed == ({"blocks.0.attn.qkv", "blocks.0.mlp.fc1"} if recipe == "dit-fashion" else set())
    assert {path for path, layer in report["layers"].items() if "smoothed threshold" in layer} == smoothed
    assert report["layers"].keys() == schemes.keys()
    assert all(len(layer["input"]["ranges"]) == 20 for layer in report["layers"].values())
    fused = optimised_ops(tmp_path)
    assert fused.count("MatMulIntegerToFloat") + fused.count("QLinearConv") == len(schemes)


def optimised_ops(folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    multiply_exactly(options, folder / "out/model.onnx")
    ort.InferenceSession(folder / "out/model.onnx", options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node]
