"""Runs of ``dexport sample``: the same pictures however they are batched, interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dexport.cli import main
from dexport.errors import UsageError
from dexport.runtime.gallery import Gallery
from dexport.runtime.generate import Generated, SampleRequest, generate
from dexport.runtime.opened import OpenProgram


def run(bundle: Path, output: Path, force: bool = False, on_progress: Any = None, **options: Any) -> Generated:
    """Of a few steps; what is no field of a request is a setting."""
    fields = {name: options.pop(name) for name in ("classes", "count", "seed", "batch") if name in options}
    request = SampleRequest(**{**fields, "classes": tuple(fields.get("classes", ()))}, settings={"steps": 4, **options})
    more = {} if on_progress is None else {"on_progress": on_progress}
    return generate(OpenProgram.open(bundle), output, request, force=force, **more)


def pictures(generated: Generated) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in generated.folder.glob("*.png")}


def test_one_picture_of_each_class_by_default(plain: Path, tmp_path: Path) -> None:
    generated = run(plain, tmp_path / "out.png")
    assert (generated.made, generated.kept) == (10, 0)
    assert generated.settings["labels"] == list(range(10))
    assert generated.settings["program"]["cfg_scale"] == 2.0
    assert generated.grid.exists()
    assert sorted(pictures(generated)) == [f"{number:05d}.png" for number in range(10)]


def test_interrupted_run_makes_the_missing_pictures_only(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(plain, tmp_path / "whole.png", classes=[1, 2, 3], count=2)

    def interrupt(done: int, _total: int, _detail: str) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plain, tmp_path / "out.png", classes=[1, 2, 3], count=2, batch=2, on_progress=interrupt)
    assert not (tmp_path / "out.png").exists()
    made: list[int] = []
    add = Gallery.add
    monkeypatch.setattr(Gallery, "add", lambda self, number, image: (made.append(number), add(self, number, image)))
    resumed = run(plain, tmp_path / "out.png", classes=[1, 2, 3], count=2, batch=2)
    assert made == [4, 5]
    assert (resumed.made, resumed.kept) == (2, 4)
    assert pictures(resumed) == pictures(whole)


def test_nothing_is_left_of_a_refused_run(plain: Path, tmp_path: Path) -> None:
    for options in ({"classes": [10]}, {"sampler": "edm"}, {"count": 0}, {"batch": 0}, {"cfg_scale": 0.5}):
        with pytest.raises(UsageError):
            run(plain, tmp_path / "out.png", **options)
    with pytest.raises(UsageError, match="not a PNG"):
        run(plain, tmp_path / "out.jpg")
    assert list(tmp_path.iterdir()) == []


def test_seeds_give_other_pictures(plain: Path, tmp_path: Path) -> None:
    first, second = (run(plain, tmp_path / f"{seed}.png", classes=[1], seed=seed) for seed in (0, 1))
    assert pictures(first) != pictures(second)


def sample_command(bundle: Path, output: Path, *options: str) -> list[str]:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "from dexport.cli import main\n"
        "main()\n"
    )
    return [sys.executable, "-c", code, "sample", str(bundle), "-o", str(output), *options]


def test_the_command_needs_neither_torch_nor_onnx(plain: Path, tmp_path: Path) -> None:
    command = sample_command(plain, tmp_path / "out.png", "--classes", "3,1", "--steps", "4", "--cfg", "1.5")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 images in ")
    expected = run(plain, tmp_path / "here.png", classes=[3, 1], cfg_scale=1.5)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out-images").glob("*.png")} == pictures(expected)


def test_a_killed_run_is_resumed(plain: Path, tmp_path: Path) -> None:
    command = sample_command(plain, tmp_path / "out.png", "--count", "20", "--steps", "20", "--batch", "1")
    folder = tmp_path / "out-images"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.png"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 2 <= len(before) < 200
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} kept" in done.stdout
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(after) == 200
    assert before.items() <= after.items()
    images = Gallery(folder, *_settings(folder)).images()
    assert images.shape == (200, 32, 32, 1)
    assert np.ptp(images) > 0


def _settings(folder: Path) -> tuple[dict[str, object], list[str]]:
    settings = json.loads((folder / "run.json").read_text())
    return settings, [""] * len(settings["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "10"], "no class 10: the model has 10"),
        (["--classes", "a"], "is not a list of numbers"),
        (["--steps", "1001"], "the schedule has 1000"),
        (["--stitch-fraction", "0.5"], "cannot be stitched"),
        (["--cfg", "0"], "cfg_scale 0"),
        (["--seed", "-1"], "both count from 0"),
        (["--sampler", "edm"], "does not share"),
    ],
)
def test_refusals_of_the_command(plain: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["sample", str(plain), "-o", str(tmp_path / "out.png"), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tampered_bundle_is_not_run(plain: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    with (copy / "model.onnx.data").open("r+b") as file:
        file.write(b"x")
    result = CliRunner().invoke(main, ["sample", str(copy), "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 4
    assert "sha256 differs" in result.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_another_run_and_what_it_finds_in_the_folder(plain: Path, tmp_path: Path) -> None:
    first = run(plain, tmp_path / "out.png", classes=[1, 2, 3])
    for name in ("2024-holiday.png", "7.pdf"):
        (first.folder / name).write_text("mine")
    (first.folder / "00001.png").write_bytes(b"cut")
    kept = run(plain, tmp_path / "out.png", classes=[1, 2, 3])
    assert (kept.made, kept.kept, kept.set_aside) == (1, 2, ())
    with pytest.raises(UsageError, match="other settings"):
        run(plain, tmp_path / "out.png", classes=[4])
    forced = run(plain, tmp_path / "out.png", classes=[4], force=True)
    assert (forced.made, forced.kept) == (1, 0)
    assert names(forced.folder) == ["00000.png", "2024-holiday.png", "7.pdf", "run.json"]


def test_two_runs_into_one_folder(plain: Path, tmp_path: Path) -> None:
    """The second one starts while the first is at work."""
    refused: list[str] = []

    def second(done: int, _total: int, _detail: str) -> None:
        if done == 2:
            with pytest.raises(UsageError) as error:
                run(plain, tmp_path / "out.png", classes=[1, 2, 3], batch=2)
            refused.append(str(error.value))

    first = run(plain, tmp_path / "out.png", classes=[1, 2, 3], batch=2, on_progress=second)
    assert len(refused) == 1 and "is being filled by another run" in refused[0]
    assert pictures(first) == pictures(run(plain, tmp_path / "alone.png", classes=[1, 2, 3]))
    assert names(tmp_path) == ["alone-images", "alone.png", "out-images", "out.png"]


def test_two_processes_into_one_folder(plain: Path, tmp_path: Path) -> None:
    """Whoever comes second is refused or finds everything done; the pictures are those of one run alone."""
    command = sample_command(plain, tmp_path / "out.png", "--count", "2", "--steps", "4", "--batch", "1")
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate()[1], process.returncode) for process in both]
    assert 0 in [code for _, code in ended]
    for errors, code in ended:
        assert code == 0 or (code == 2 and "\nerror: " in f"\n{errors}" and "another run" in errors), errors
        assert "Traceback" not in errors
    alone = run(plain, tmp_path / "alone.png", count=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out-images").glob("*.png")} == pictures(alone)
    assert names(tmp_path) == ["alone-images", "alone.png", "out-images", "out.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "10"], "no class 10"),
        (["--classes", "3,-1"], "no class -1"),
        (["--classes", "x"], "is not a list of numbers"),
        (["--steps", "1001"], "the schedule has 1000"),
        (["--sampler", "edm"], "does not share"),
        (["--cfg", "nan"], "--cfg nan is out of range"),
        (["--seed", "-1"], "count from 0"),
        (["--count", "0"], "both start at 1"),
        (["--stitch-fraction", "0.5"], "cannot be stitched"),
        (["--output", "out.jpg"], "not a PNG"),
        (["--output", "folder.png"], "is no regular file"),
        (["--output", "file/out.png"], "is no folder"),
        (["--decoder", "missing"], "is not a bundle"),
        (["--decoder", "BUNDLE"], "a decoder takes a latent"),
    ],
)
def test_bad_requests_are_refused_before_a_network_is_loaded(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    def load(*_: object) -> None:
        pytest.fail("a network was loaded")

    monkeypatch.setattr("dexport.runtime.opened.open_session", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    arguments = [str(plain) if option == "BUNDLE" else option for option in options]
    result = CliRunner().invoke(main, ["sample", str(plain), *arguments])
    assert result.exit_code in (2, 4), result.output
    assert message in result.stderr
    assert names(tmp_path) == ["file", "folder.png"]
