"""``dexport fid`` over pixels, which need no weights: counts, floor, reference files, and what must be refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dexport.cli import main
from dexport.errors import InputError
from dexport.validate import fid
from dexport.validate.distances import PIXELS, Moments, frechet_distance, kernel_distance, pooled_pixels
from dexport.validate.features.evaluator import Evaluator, Features
from dexport.validate.features.statistics import holds_statistics, read_statistics, summarise, write_statistics
from dexport.validate.fid import measure_fid
from dexport.validate.images.image_sets import open_images


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


def folder_of(path: Path, images: np.ndarray, suffix: str = "png") -> Path:
    path.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(path / f"{suffix}-{number}.{suffix}")
    return path


def test_what_was_counted_and_skipped_is_said(write: Callable[..., Path], tmp_path: Path) -> None:
    real = write("real", pictures(30, seed=1))
    folder = folder_of(tmp_path / "ours", pictures(20, seed=0))
    folder_of(folder, pictures(20, seed=2), "PNG")
    (folder / "\x1b[31mnotes\n.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    os.mkfifo(folder / "00000.png")
    report = measure_fid(folder, real, evaluator="pixels")
    assert report.samples.count == 40
    assert {(one.why, one.count) for one in report.skipped} == {
        ("hidden", 1),
        ("no PNG, JPEG or WebP files", 1),
        ("no regular files", 1),
    }
    shown = run("--evaluator=pixels", folder, real).stdout
    assert "40 images" in shown and "1 hidden (.hidden/)" in shown and "1 no regular files (00000.png)" in shown
    assert "\x1b" not in shown
    document = json.loads(run("--evaluator=pixels", folder, real, "--json").stdout)
    assert [one["count"] for one in document["skipped"]] == [1, 1, 1]
    saved = run("--evaluator=pixels", folder, "--save-stats", tmp_path / "s.npz", "--json")
    assert len(json.loads(saved.stdout)["skipped"]) == 3
    assert "1 hidden (.hidden/)" in run("--evaluator=pixels", folder, "--save-stats", tmp_path / "s.npz").stdout


GOOD = {"mu": np.zeros(4), "sigma": np.eye(4)}
INDEFINITE = np.eye(64)
INDEFINITE[0, 1] = INDEFINITE[1, 0] = 5.0
WRONG_MOMENTS: list[dict[str, object]] = [
    {"mu": np.zeros((4, 1))},
    {"mu": np.zeros(())},
    {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
    {"sigma": np.zeros(16)},
    {"sigma": np.zeros((4, 4, 1))},
    {"mu": np.zeros(4, "U1")},
    {"sigma": np.eye(4, dtype=np.complex128)},
    {"sigma": np.eye(4, dtype=bool)},
    {"mu": np.array([0, np.nan, 0, 0])},
    {"sigma": np.full((4, 4), np.inf)},
    {"sigma": np.eye(4) * 1e200},
    {"mu": np.full(4, -1e300)},
    {"sigma": np.triu(np.ones((4, 4)))},
    {"sigma": -np.eye(4)},
    {"count": 0},
    {"count": 1},
    {"count": -5},
    {"count": np.nan},
    {"count": 2.5},
    {"count": np.array([5])},
    {"count": "five"},
    {"count": np.inf},
    {"evaluator": np.zeros(3)},
    {"evaluator": np.array(["inception"] * 2)},
    {"evaluator": "x" * 2000},
    {"evaluator": "\x1b]0;title\x07"},
    {"weights_sha256": 5},
    {"mu_s": np.zeros(3), "sigma_s": np.eye(4)},
]


@pytest.mark.parametrize("change", WRONG_MOMENTS)
def test_moments_that_no_features_have(tmp_path: Path, change: dict[str, object]) -> None:
    np.savez(tmp_path / "stats.npz", **(GOOD | change))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"stats\.npz") as refused:
        read_statistics(tmp_path / "stats.npz", spatial_evaluator())
    assert not {"\n", "\x1b"} & set(str(refused.value))


def test_moments_stored_in_float32_are_taken(tmp_path: Path) -> None:
    pooled = pooled_pixels(pictures(300, seed=0))
    moments = Moments.of(pooled)
    single = {"mu": moments.mean.astype(np.float32), "sigma": np.asfortranarray(moments.covariance.astype(np.float32))}
    np.savez(tmp_path / "stats.npz", **single)
    read = read_statistics(tmp_path / "stats.npz", spatial_evaluator()).moments
    assert frechet_distance(read, moments) == pytest.approx(0, abs=1e-6)


def test_a_covariance_with_a_negative_eigenvalue(write: Callable[..., Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=INDEFINITE, evaluator="pixels", weights_sha256="")
    result = run("--evaluator=pixels", write("a", pictures(9, seed=0)), tmp_path / "stats.npz")
    assert result.exit_code == 4
    assert "a covariance has the eigenvalue -4" in result.stderr


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    os.mkfifo(tmp_path / "fifo.npz")
    (tmp_path / "folder.npz").mkdir()
    assert not holds_statistics(tmp_path / "fifo.npz")
    assert not holds_statistics(tmp_path / "folder.npz")
    for name in ("text", "fifo", "folder"):
        result = run("--evaluator=pixels", tmp_path / f"{name}.npz", tmp_path / f"{name}.npz")
        assert result.exit_code == 4, result.output
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 2


def test_a_bad_reference_is_found_before_the_samples_are_evaluated(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(_images: np.ndarray) -> Features:
        pytest.fail("an image was evaluated")

    monkeypatch.setattr(fid, "open_evaluator", lambda *_: Evaluator("pixels", PIXELS, extract))
    ours = write("ours", pictures(9, seed=0))
    np.savez(tmp_path / "stats.npz", mu=np.full(64, np.nan), sigma=np.eye(64), evaluator="pixels", weights_sha256="")
    folder = folder_of(tmp_path / "set", pictures(3, seed=0))
    (folder / "last.png").write_bytes(b"no picture")
    for reference in (tmp_path / "stats.npz", folder):
        with pytest.raises(InputError):
            measure_fid(ours, reference, evaluator="pixels")


def test_places_of_statistics(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(_images: np.ndarray) -> Features:
        pytest.fail("an image was evaluated")

    images = write("a", pictures(9, seed=0))
    before = images.read_bytes()
    monkeypatch.setattr(fid, "open_evaluator", lambda *_: Evaluator("pixels", PIXELS, extract))
    (tmp_path / "folder.npz").mkdir()
    for place, message in ((images, "is the file of the images"), (tmp_path / "folder.npz", "is no regular file")):
        result = run("--evaluator=pixels", images, "--save-stats", place)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert run("--evaluator=pixels", images, "--save-stats", tmp_path / "s.npz", "--batch=0").exit_code == 2
    assert images.read_bytes() == before
