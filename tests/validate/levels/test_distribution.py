"""The level ``distribution`` over pixels: paired deltas, refusals, and runs that go on where they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.errors import InputError
from dexport.runtime.gallery import Gallery
from dexport.validate import validate as module
from dexport.validate.features.evaluator import Evaluator, Features
from dexport.validate.validate import Distribution, validate
from tests.validate.faults import planted


def noise(count: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 8, 8, channels))
    return np.repeat(np.repeat(blocks, 4, axis=1), 4, axis=2).astype(np.uint8)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    np.savez(tmp_path / "real.npz", noise(100))
    return tmp_path / "real.npz"


def arguments(bundle: Path, real: Path, *more: object) -> list[str]:
    options = ("--level", "distribution", "--evaluator", "pixels", "--reference", real, "--no-record", "--steps", 2)
    work = ("--work", real.parent / "work", "--count", 3)
    return ["validate", *map(str, (bundle, *options, *work, *more))]


def run(bundle: Path, real: Path, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(bundle, real, *more), catch_exceptions=False)


def report_of(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def test_a_clean_bundle(plain: Path, real: Path) -> None:
    result = run(plain, real, "--json", "--fail-over", "kernel_delta=1e-3")
    assert result.exit_code == 0, result.output
    report = report_of(result)
    found = report["distribution"]
    assert (found["count"], found["real_count"], found["floor"]["count"]) == (30, 100, 30)
    assert found["delta"]["low"] <= found["delta"]["delta"] <= found["delta"]["high"]
    assert abs(found["delta"]["delta"]) < 1e-3 < found["delta"]["b"]
    assert [gate["metric"] for gate in report["gates"]] == ["frechet_delta", "kernel_delta"]
    assert found["distance"] == "Fréchet distance (8x8 pixels)"
    table = run(plain, real).stdout
    for text in ("kernel distance (8x8 pixels)", "floor: 30 real images against 70 others", "not run: forward"):
        assert text in table


def test_images_that_are_farther_away_fail(plain: Path, real: Path, tmp_path: Path) -> None:
    run(plain, real)
    (by_pytorch,) = (real.parent / "work").glob("pytorch-*")
    broken = planted(plain, tmp_path / "broken", factor=0.0, weight="final_layer.linear.weight")
    result = run(broken, by_pytorch, "--json", "--work", real.parent / "work")
    assert result.exit_code == 1
    report = report_of(result)
    (gate,) = report["gates"]
    assert gate["verdict"] == "FAIL"
    assert gate["value"] > gate["low"] > gate["limit"]
    assert report["distribution"]["delta"]["b"] == pytest.approx(0, abs=1e-9)


def test_an_interval_that_spans_the_limit_does_not_pass(plain: Path, real: Path, tmp_path: Path) -> None:
    slightly = planted(plain, tmp_path / "slightly", factor=1.2, weight="final_layer.linear.weight")
    delta = report_of(run(slightly, real, "--json"))["distribution"]["delta"]
    between = (delta["delta"] + delta["high"]) / 2
    result = run(slightly, real, "--fail-over", f"frechet_delta={between}")
    assert result.exit_code == 1
    assert "inconclusive" in result.stdout
    assert "images would settle it" in result.stdout


def test_statistics_have_no_floor_and_no_kernel_distance(plain: Path, real: Path, tmp_path: Path) -> None:
    CliRunner().invoke(main, ["fid", "--evaluator", "pixels", "--save-stats", str(tmp_path / "all.npz"), str(real)])
    with np.load(tmp_path / "all.npz") as file:
        np.savez(tmp_path / "stats.npz", **{name: file[name] for name in file.files if name != "arr_0"})
    report = report_of(run(plain, tmp_path / "stats.npz", "--json"))
    whole = report_of(run(plain, real, "--json"))
    assert report["distribution"]["delta"]["a"] == pytest.approx(whole["distribution"]["delta"]["a"])
    assert (report["distribution"]["kernel_delta"], report["distribution"]["floor"]) == (None, None)
    assert sum(reason.startswith("distribution: ") for reason in report["not_run"]) == 2


def test_values_that_are_not_finite_fail_and_the_other_levels_are_kept(plain: Path, real: Path, tmp_path: Path) -> None:
    broken = planted(plain, tmp_path / "broken", factor=float("nan"), weight="final_layer.linear.bias")
    result = run(broken, real, "--level", "forward", "--json")
    assert result.exit_code == 1
    report = report_of(result)
    assert report["forward"][""]["passed"] is False
    assert report["gates"][-1]["value"] is None
    assert "not finite" in report["gates"][-1]["where"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("absent.npz", 2, "does not exist"),
        ("empty", 4, "holds no PNG files"),
        ("colours.npz", 4, "192 features per image, the samples have 64"),
        ("small.npz", 4, "must be multiples of 8"),
        ("sizes", 4, "1.png is 16x16"),
        ("nan.npz", 4, "not finite"),
        ("inception.npz", 4, "statistics of inception, not of pixels"),
    ],
)
def test_real_images_that_cannot_be_used(plain: Path, tmp_path: Path, name: str, code: int, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for number, side in enumerate((32, 16)):
        Image.new("L", (side, side)).save(tmp_path / "sizes" / f"{number}.png")
    np.savez(tmp_path / "colours.npz", noise(20, channels=3))
    np.savez(tmp_path / "small.npz", noise(20)[:, :30])
    statistics = {"mu": np.full(64, np.nan), "sigma": np.eye(64), "evaluator": np.array("pixels")}
    np.savez(tmp_path / "nan.npz", **statistics, weights_sha256=np.array(""))
    np.savez(tmp_path / "inception.npz", mu=np.zeros(64), sigma=np.eye(64))
    result = run(plain, tmp_path / name)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("empty", [], "holds no PNG files"),
        ("broken", [], "not a whole PNG, JPEG or WebP file"),
        ("sizes", [], "1.png is 16x16"),
        ("text.npz", [], "not a zip"),
        ("nan.npz", [], "not finite"),
        ("inception.npz", [], "statistics of inception, not of pixels"),
        ("real.npz", ["--classes", "99"], "no class 99"),
        ("real.npz", ["--classes", "-1"], "no class -1"),
        ("real.npz", ["--cfg", "nan"], "--cfg nan is out of range"),
        ("real.npz", ["--work", "FILE"], "is no folder"),
        ("real.npz", ["-o", "FOLDER"], "is no regular file"),
        ("real.npz", ["--html", "FILE/page.html"], "is no folder"),
    ],
)
def test_bad_inputs_are_found_before_any_level_runs(
    plain: Path, real: Path, monkeypatch: pytest.MonkeyPatch, reference: str, options: list[str], message: str
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("a level ran")

    for name in ("check_ops", "block_errors", "check_parity", "check_trajectory", "check_distribution", "weights_of"):
        monkeypatch.setattr(module, name, work)
    folder = real.parent
    for name in ("empty", "broken", "sizes"):
        (folder / name).mkdir()
    for number, side in enumerate((32, 16)):
        Image.new("L", (side, side)).save(folder / "sizes" / f"{number}.png")
        (folder / "broken" / f"{number}.jpg").write_bytes(b"no picture")
    (folder / "text.npz").write_text("no zip")
    moments = {"mu": np.full(64, np.nan), "sigma": np.eye(64)}
    np.savez(folder / "nan.npz", **moments, evaluator=np.array("pixels"), weights_sha256=np.array(""))
    np.savez(folder / "inception.npz", mu=np.zeros(64), sigma=np.eye(64))
    places = {"FILE": str(real), "FOLDER": str(folder), "FILE/page.html": str(real / "page.html")}
    given = [places.get(option, option) for option in options]
    result = run(plain, folder / reference, "--level", "forward", "--level", "trajectory", *given)
    assert result.exit_code in (2, 4), result.output
    assert message in " ".join(result.stderr.split())


def test_what_a_folder_of_real_images_holds_besides_is_told(plain: Path, real: Path) -> None:
    folder = real.parent / "folder"
    folder.mkdir()
    for number, image in enumerate(noise(12)):
        Image.fromarray(image[..., 0]).save(folder / f"{number}.{'png' if number % 2 else 'PNG'}")
    (folder / "notes.txt").write_text("mine")
    (folder / ".ipynb_checkpoints").mkdir()
    found = report_of(run(plain, folder, "--json"))["distribution"]
    assert found["real_count"] == 12
    skipped = [warning for warning in found["warnings"] if "skipped" in warning]
    assert len(skipped) == 2 and "notes.txt" in skipped[1] and ".ipynb_checkpoints/" in skipped[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "both start at 1"),
        (["--count", "1", "--classes", "1"], "two images or more"),
        (["--fail-over", "fid_delta=1"], "frechet_delta"),
        (["--evaluator-weights", "file"], "has no weights"),
    ],
)
def test_refusals(plain: Path, real: Path, options: list[str], message: str) -> None:
    result = run(plain, real, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_features_that_are_not_finite(plain: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(images: np.ndarray) -> Features:
        features = images.reshape(len(images), -1)[:, :4].astype(np.float32)
        features[-1] = np.nan
        return Features(features)

    monkeypatch.setattr(module, "open_evaluator", lambda *_: Evaluator("pixels", "distance", extract))
    with pytest.raises(InputError, match="are not finite"):
        validate(
            load_bundle(plain),
            ["distribution"],
            settings={"steps": 2},
            distribution=Distribution(real, count=1, work=real.parent),
        )


def test_colours_are_told_from_their_sizes(plain: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", np.repeat(np.repeat(noise(20), 2, axis=1), 2, axis=2))
    report = report_of(run(plain, tmp_path / "large.npz", "--json"))
    assert any("32x32x1 and 64x64x1" in warning for warning in report["distribution"]["warnings"])


def pictures(work: Path) -> list[Path]:
    return sorted(work.glob("*/[0-9]*.png"))


def test_a_run_that_failed_goes_on(plain: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = report_of(run(plain, real, "--json", "--work", real.parent / "other"))
    kept, added = Gallery.add, []

    def add(gallery: Gallery, number: int, image: np.ndarray) -> None:
        if len(added) == 11:
            raise KeyboardInterrupt
        added.append(number)
        kept(gallery, number, image)

    with monkeypatch.context() as patch:
        patch.setattr(Gallery, "add", add)
        CliRunner().invoke(main, arguments(plain, real))
    assert len(pictures(real.parent / "work")) == 11
    before = {path: path.stat().st_mtime_ns for path in pictures(real.parent / "work")}
    again = report_of(run(plain, real, "--json"))
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    assert again["distribution"] == expected["distribution"]


KILLED = """
import os, signal, sys
from dexport.cli import main
from dexport.runtime import gallery

to_pil, calls = gallery.to_pil, []

def killed(image):  # while the file of the sixth picture is open
    calls.append(image)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_pil(image)

gallery.to_pil = killed
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(plain: Path, real: Path) -> None:
    work = real.parent / "work"
    command = [sys.executable, "-c", KILLED, *arguments(plain, real, "--batch", 2)]
    died = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    before = {path: path.stat().st_mtime_ns for path in pictures(work)}
    assert len(before) == 5
    assert len(list(work.rglob("*.partial*"))) == 1
    result = run(plain, real, "--batch", 2, "--json")
    assert result.exit_code == 0, result.output
    assert len(pictures(work)) == 60
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    assert list(work.rglob("*.partial*")) == []
