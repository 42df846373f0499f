"""Trajectory parity: clean bundles pass, planted faults show where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dexport.bundle import load_bundle
from dexport.errors import InputError, UsageError
from dexport.exporter.torch_session import TorchSession
from dexport.runtime.opened import OpenProgram
from dexport.validate.images.picture_metrics import psnr, ssim
from dexport.validate.levels.trajectory import TrajectoryReport, check_trajectory
from dexport.validate.references.recipe_network import reference_of, variant_of, weights_of
from tests.bundles import build_narrow
from tests.runtime.running import with_session

STEPS = 6


def programs(path: Path, **options: object) -> tuple[OpenProgram, OpenProgram]:
    """A bundle's program, and the same one on PyTorch."""
    bundle = load_bundle(path)
    references = {
        (network.name, graph): reference_of(network, graph, **options)  # type: ignore[arg-type]
        for network in bundle.networks.values()
        for graph in network.graphs
    }
    return OpenProgram(bundle), OpenProgram(bundle, open_graph=lambda network, graph: references[network.name, graph])


def check(actual: OpenProgram, reference: OpenProgram, gate: float = 60.0, **options: Any) -> TrajectoryReport:
    settings = {"steps": STEPS, "sampler": options.pop("sampler", None)}
    sides = [program.with_settings(**settings) for program in (actual, reference)]
    return check_trajectory(*sides, [1, 8], gate_snr_db=gate, **options)


def test_a_clean_bundle_passes(plain: Path) -> None:
    report = check(*programs(plain))
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

    report = check(*programs(plain), lpips=measure)
    assert len(report.lpips) == len(report.psnr_db) == 2
    assert sorted(pair.lpips or 0 for pair in report.pairs) == sorted(report.lpips)


def test_a_fused_one_and_a_stitched_one_pass(stitched: Path, tmp_path: Path) -> None:
    for path in (stitched, build_narrow(tmp_path / "fused", guidance="fused")):
        assert check(*programs(path), sampler="ddim").passed


@pytest.mark.parametrize("fault", ["weight", "network"])
def test_a_planted_fault_fails(plain: Path, fault: str) -> None:
    bundle = load_bundle(plain)
    variant = variant_of(bundle.network)
    module = variant.module()
    weights = weights_of(bundle.network.manifest["weights"], variant)
    module.load_state_dict({name: weights.read(name, value.dtype) for name, value in module.state_dict().items()})
    if fault == "weight":
        with torch.no_grad():
            module.blocks[0].mlp.fc1.weight.mul_(1.05)
    else:
        module.blocks[0].mlp.act = torch.nn.ReLU()
    broken = with_session(bundle, TorchSession(module, variant_of(bundle.network).signature))
    report = check(broken, with_session(bundle, reference_of(bundle.network)))
    assert not report.passed
    assert report.worst_evaluation.metrics.relative_l2 > 1e-4


def test_values_that_are_not_finite_fail(plain: Path) -> None:
    bundle = load_bundle(plain)
    module = variant_of(bundle.network).module()
    with torch.no_grad():
        module.final_layer.linear.bias.fill_(math.nan)
    broken = with_session(bundle, TorchSession(module, variant_of(bundle.network).signature))
    report = check(broken, with_session(bundle, reference_of(bundle.network)))
    assert not report.passed
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["states"][0]["relative_l2"] is None


def test_the_reference_takes_the_weights_of_the_build_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "bundle"
    module = variant_of(load_bundle(build_narrow(tmp_path / "first")).network).module()
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    build_narrow(path, checkpoint=str(tmp_path / "w.safetensors"))
    assert check(*programs(path)).passed
    (tmp_path / "w.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(UsageError, match="which is not there"):
        programs(path)
    assert check(*programs(path, checkpoint=str(tmp_path / "moved.safetensors"))).passed
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="sha256 differs"):
        programs(path)


def test_no_images(plain: Path) -> None:
    with pytest.raises(UsageError, match="at least one image"):
        check_trajectory(*programs(plain), [], gate_snr_db=60)


def test_likeness_of_pictures() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert (psnr(picture, picture), ssim(picture, picture)) == (math.inf, 1.0)
    one_off = (picture ^ 1).astype(np.uint8)
    assert psnr(picture, one_off) == pytest.approx(10 * math.log10(255**2))
    assert 0.99 < ssim(picture, one_off) < 1
    assert ssim(picture, rng.integers(0, 256, (32, 32, 3), np.uint8)) < 0.2
