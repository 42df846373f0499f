"""``dexport fid`` over pixels, which need no weights: counts, floor, reference files, and what must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dexport.cli import main
from dexport.errors import InputError
from dexport.validate import fid
from dexport.validate.distances import PIXELS, Moments, frechet_distance, kernel_distance, pooled_pixels
from dexport.validate.features.evaluator import Evaluator, Features
from dexport.validate.fid import measure_fid
from dexport.validate.images import open_images
from dexport.validate.statistics import read_statistics, summarise, write_statistics


def pictures(count: int, seed: int, channels: int = 1, side: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centre = rng.integers(60, 190, (count, 1, 1, channels))
    return np.clip(centre + rng.normal(0, 20, (count, side, side, channels)), 0, 255).astype(np.uint8)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, images: np.ndarray) -> Path:
        path = tmp_path / f"{name}.npz"
        np.savez(path, images)
        return path

    return write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["fid", *map(str, arguments)], catch_exceptions=False)


def test_report(write: Callable[..., Path]) -> None:
    ours, real = pictures(30, seed=0), pictures(100, seed=1)
    a, b = write("ours", ours), write("real", real)
    report = measure_fid(a, b, evaluator="pixels", batch=7)
    ours_pooled, real_pooled = pooled_pixels(ours), pooled_pixels(real)
    assert report.frechet == pytest.approx(frechet_distance(Moments.of(ours_pooled), Moments.of(real_pooled)))
    assert report.kernel == pytest.approx(kernel_distance(ours_pooled, real_pooled), abs=1e-6)
    assert (report.distance, report.evaluator, report.seed) == (PIXELS, "pixels", 0)
    assert (report.samples.count, report.reference.count) == (30, 100)
    assert report.floor is not None
    assert (report.floor.count, report.floor.against) == (30, 70)
    assert report.precision_recall is not None
    assert report.score is None
    assert any("ours.npz has 30 images: below 64" in warning for warning in report.warnings)


def test_floor_of_a_small_reference_is_half_against_half(write: Callable[..., Path]) -> None:
    report = measure_fid(
        write("ours", pictures(90, seed=0)), write("real", pictures(100, seed=1)), evaluator="pixels", seed=4
    )
    assert report.floor is not None
    assert (report.floor.count, report.floor.against) == (50, 50)
    assert abs(report.floor.kernel) < 0.01
    assert report.rbf is not None and report.floor.rbf < 0.01


def test_reference_file_in_adms_layout(write: Callable[..., Path], tmp_path: Path) -> None:
    real = write("real", pictures(50, seed=1))
    result = run("--evaluator", "pixels", "--save-stats", tmp_path / "stats.npz", real)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'stats.npz'}: 50 images, pixels\n")
    with np.load(tmp_path / "stats.npz") as file:
        assert set(file.files) >= {"mu", "sigma", "arr_0"}
        np.testing.assert_allclose(file["sigma"], np.cov(pooled_pixels(file["arr_0"]), rowvar=False), atol=1e-12)
        np.savez(tmp_path / "bare.npz", **{key: file[key] for key in file.files if key != "arr_0"})
    ours = write("ours", pictures(50, seed=0))
    direct = measure_fid(ours, real, evaluator="pixels")
    whole = measure_fid(ours, tmp_path / "stats.npz", evaluator="pixels")
    bare = measure_fid(ours, tmp_path / "bare.npz", evaluator="pixels")
    assert whole.frechet == pytest.approx(direct.frechet, rel=1e-9)
    assert (whole.kernel, whole.rbf, whole.floor) == (direct.kernel, direct.rbf, direct.floor)
    assert bare.frechet == whole.frechet
    assert (bare.kernel, bare.rbf, bare.floor, bare.reference.count) == (None, None, None, 50)
    assert any(line.startswith("floor:") for line in bare.not_run)


def spatial_evaluator(sha256: str = "abc") -> Evaluator:
    def extract(images: np.ndarray) -> Features:
        pooled = pooled_pixels(images)
        return Features(pooled, pooled[:, ::2], pooled[:, :5])

    return Evaluator("inception", "FID", extract, "sFID", "file", sha256)


def test_spatial_distance_and_score(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid, "open_evaluator", lambda *_: spatial_evaluator())
    ours, real = write("ours", pictures(40, seed=0)), write("real", pictures(50, seed=1))
    images = open_images(real)
    write_statistics(tmp_path / "stats.npz", summarise(images, spatial_evaluator()), images, spatial_evaluator())
    report = measure_fid(ours, real)
    assert report.spatial is not None
    assert report.spatial > 0
    assert report.score is not None
    assert report.score[0] >= 1
    assert report.not_run == ()
    assert measure_fid(ours, tmp_path / "stats.npz").spatial == pytest.approx(report.spatial)
    result = run(ours, real)
    for text in ("FID", "sFID", "KID x 1000", "Inception Score", "40 images", "sha256 abc", "25 images of", "warning"):
        assert text in result.stdout


def test_statistics_that_do_not_fit(tmp_path: Path) -> None:
    evaluator = spatial_evaluator()
    good = {"mu": np.zeros(4), "sigma": np.eye(4)}
    for change, message in (
        ({"sigma": np.eye(3)}, r"mu \[4\] and sigma \[3, 3\] do not fit"),
        ({"mu": np.full(4, np.nan)}, "not finite"),
        ({"evaluator": np.array("pixels")}, "statistics of pixels, not of inception"),
        ({"weights_sha256": np.array("f" * 64)}, "made with weights ffff"),
    ):
        np.savez(tmp_path / "stats.npz", **(good | change))
        with pytest.raises(InputError, match=message):
            read_statistics(tmp_path / "stats.npz", evaluator)
    np.savez(tmp_path / "stats.npz", **good)
    assert read_statistics(tmp_path / "stats.npz", evaluator).moments.count is None


def test_reference_of_other_dimensions(write: Callable[..., Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4), evaluator="pixels", weights_sha256="")
    result = run("--evaluator=pixels", write("a", pictures(9, seed=0)), tmp_path / "stats.npz")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "has 4 features per image, the samples have 64" in result.stderr


def test_features_that_are_not_finite(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Evaluator("inception", "FID", lambda images: Features(np.full((len(images), 3), np.nan)))
    monkeypatch.setattr(fid, "open_evaluator", lambda *_: broken)
    images = write("a", pictures(4, seed=0))
    result = run(images, images)
    assert result.exit_code == 4
    assert "not finite" in result.stderr


def test_images_of_two_sizes_are_compared_with_a_warning(write: Callable[..., Path]) -> None:
    a, b = write("a", pictures(300, seed=0)), write("b", pictures(300, seed=1, side=16))
    report = measure_fid(a, b, evaluator="pixels")
    assert report.warnings == ("the sets have images of 8x8x1 and 16x16x1: the difference is part of the distance",)


def test_json_and_refusals(write: Callable[..., Path], tmp_path: Path) -> None:
    images = write("a", pictures(6, seed=0))
    document = json.loads(run("--evaluator", "pixels", images, images, "--json").stdout)
    assert document["frechet"] == pytest.approx(0, abs=1e-9)
    assert document["samples"] == {"path": str(images), "count": 6}
    saved = run("--evaluator", "pixels", images, "--save-stats", tmp_path / "s.npz", "--json")
    assert json.loads(saved.stdout)["count"] == 6
    for arguments, code, message in (
        ((images,), 2, "give a reference B, or --save-stats"),
        ((images, images, "--save-stats", tmp_path / "s.npz"), 2, "give a reference B, or --save-stats"),
        ((images, "--save-stats", tmp_path / "s.txt", "--evaluator=pixels"), 2, "is not an .npz file"),
        ((images, tmp_path / "missing.npz", "--evaluator=pixels"), 2, "does not exist"),
        ((images, images, "--evaluator=pixels", "--weights", images), 2, "pixels has no weights"),
        ((images, images, "--evaluator=pixels", "--batch=0"), 2, "--batch 0"),
        ((images, images, "--evaluator=pixels", "--seed=-1"), 2, "--seed -1"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert message in result.stderr


def test_one_image_has_no_distance(write: Callable[..., Path]) -> None:
    one, two = write("one", pictures(1, seed=0)), write("two", pictures(2, seed=0))
    assert "1 images have no covariance" in run(one, two, "--evaluator=pixels").stderr
    assert run(two, two, "--evaluator=pixels").exit_code == 0
