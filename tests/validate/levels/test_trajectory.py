"""Trajectory parity: clean bundles pass, planted faults show where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dexport.runtime.pipeline import Pipeline

from dexport.bundle import load_bundle
from dexport.errors import InputError, UsageError
from dexport.exporter.torch_session import TorchSession
from dexport.validate.images.picture_metrics import psnr, ssim
from dexport.validate.levels.trajectory import TrajectoryReport, check_trajectory
from dexport.validate.references.recipe_network import reference_of, variant_of, weights_of
from tests.bundles import build_narrow

STEPS = 6


def pipelines(path: Path, **options: object) -> tuple[Pipeline, Pipeline]:
    bundle = load_bundle(path)
    parts = [part for part, _ in bundle.stitch] or [bundle]
    return Pipeline(bundle), Pipeline(bundle, sessions=[reference_of(part, **options) for part in parts])  # type: ignore[arg-type]


def check(actual: Pipeline, reference: Pipeline, gate: float = 60.0, **options: object) -> TrajectoryReport:
    return check_trajectory(actual, reference, [1, 8], steps=STEPS, gate_snr_db=gate, **options)  # type: ignore[arg-type]


def test_a_clean_bundle_passes(plain: Path) -> None:
    report = check(*pipelines(plain))
    assert report.passed
    assert len(report.states) == len(report.evaluations) == STEPS
    assert report.states[0].t == report.evaluations[0].t == 999
    assert min(at.metrics.snr_db for at in report.states) > 90
    assert min(report.psnr_db) > 60
    assert min(report.ssim) > 0.9999
    assert json.loads(json.dumps(report.to_json()))["passed"]
    assert report.lpips == ()


def test_lpips_of_every_picture_and_of_the_worst_pairs(plain: Path) -> None:
    def measure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a.astype(float) - b).mean(axis=(1, 2, 3)) + 0.25

    report = check(*pipelines(plain), lpips=measure)
    assert len(report.lpips) == len(report.psnr_db) == 2
    assert sorted(pair.lpips or 0 for pair in report.pairs) == sorted(report.lpips)


def test_a_fused_one_and_a_stitched_one_pass(stitched: Path, tmp_path: Path) -> None:
    for path in (stitched, build_narrow(tmp_path / "fused", guidance="fused")):
        assert check(*pipelines(path), sampler="ddim").passed


@pytest.mark.parametrize("fault", ["weight", "network"])
def test_a_planted_fault_fails(plain: Path, fault: str) -> None:
    bundle = load_bundle(plain)
    variant = variant_of(bundle.manifest)
    module = variant.module()
    weights = weights_of(bundle.network.manifest["weights"], variant)
    module.load_state_dict({name: weights.read(name, value.dtype) for name, value in module.state_dict().items()})
    if fault == "weight":
        with torch.no_grad():
            module.blocks[0].mlp.fc1.weight.mul_(1.05)
    else:
        module.blocks[0].mlp.act = torch.nn.ReLU()
    broken = Pipeline(bundle, sessions=[TorchSession(module, variant_of(bundle.manifest).signature)])
    report = check(broken, Pipeline(bundle, sessions=[reference_of(bundle)]))
    assert not report.passed
    assert report.worst_evaluation.metrics.relative_l2 > 1e-4


def test_values_that_are_not_finite_fail(plain: Path) -> None:
    bundle = load_bundle(plain)
    module = variant_of(bundle.manifest).module()
    with torch.no_grad():
        module.final_layer.linear.bias.fill_(math.nan)
    broken = Pipeline(bundle, sessions=[TorchSession(module, variant_of(bundle.manifest).signature)])
    report = check(broken, Pipeline(bundle, sessions=[reference_of(bundle)]))
    assert not report.passed
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["states"][0]["relative_l2"] is None


def test_the_reference_takes_the_weights_of_the_build_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "bundle"
    module = variant_of(load_bundle(build_narrow(tmp_path / "first")).manifest).module()
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    build_narrow(path, checkpoint=str(tmp_path / "w.safetensors"))
    assert check(*pipelines(path)).passed
    (tmp_path / "w.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(UsageError, match="which is not there"):
        pipelines(path)
    assert check(*pipelines(path, checkpoint=str(tmp_path / "moved.safetensors"))).passed
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="sha256 differs"):
        pipelines(path)


def test_no_images(plain: Path) -> None:
    with pytest.raises(UsageError, match="at least one image"):
        check_trajectory(*pipelines(plain), [], gate_snr_db=60)


def test_likeness_of_pictures() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert (psnr(picture, picture), ssim(picture, picture)) == (math.inf, 1.0)
    one_off = (picture ^ 1).astype(np.uint8)
    assert psnr(picture, one_off) == pytest.approx(10 * math.log10(255**2))
    assert 0.99 < ssim(picture, one_off) < 1
    assert ssim(picture, rng.integers(0, 256, (32, 32, 3), np.uint8)) < 0.2
