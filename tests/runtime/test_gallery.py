"""Folders of pictures: resumed when the settings are the same, refused when they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dexport.bundle import load_bundle
from dexport.errors import MachineError, UsageError
from dexport.runtime.gallery import MARGIN, Gallery, draw_grid

SETTINGS = {"seed": 0, "labels": [1, 2, 3]}
CAPTIONS = ["one", "two", "three"]


def picture(value: int, channels: int = 3) -> np.ndarray:
    return np.full((8, 8, channels), value, dtype=np.uint8)


def test_what_is_missing_and_what_is_there(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    assert gallery.missing() == [0, 1, 2]
    gallery.add(1, picture(7))
    again = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    assert again.missing() == [0, 2]
    assert np.asarray(Image.open(again.path(1))).max() == 7


def test_a_picture_that_was_cut_off_is_missing(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    (gallery.folder / ".00000.png.partial-0123abcd").write_bytes(b"half")
    assert gallery.missing() == [0, 1, 2]


def test_other_settings_are_refused_unless_forced(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    gallery.add(0, picture(7))
    with pytest.raises(UsageError, match="other settings") as refused:
        Gallery(tmp_path / "g", {**SETTINGS, "seed": 1}, CAPTIONS)
    assert "--force" in refused.value.hint
    assert gallery.path(0).exists()
    forced = Gallery(tmp_path / "g", {**SETTINGS, "seed": 1}, CAPTIONS, force=True)
    assert forced.missing() == [0, 1, 2]
    assert json.loads((tmp_path / "g" / "run.json").read_text())["seed"] == 1


def test_a_folder_with_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "00000.png").write_text("mine")
    with pytest.raises(UsageError, match="holds no samples"):
        Gallery(tmp_path, SETTINGS, CAPTIONS, force=True)
    assert (tmp_path / "00000.png").read_text() == "mine"


def test_pictures_in_a_bundle_are_refused(plain: Path) -> None:
    with pytest.raises(UsageError, match="would lie in the bundle"):
        Gallery(plain / "samples", {}, ["a"])
    load_bundle(plain)


def test_a_full_disk_leaves_the_finished_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    gallery.add(0, picture(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MachineError, match="No space left"):
        gallery.add(1, picture(2))
    assert gallery.missing() == [1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_every_picture_under_its_caption(tmp_path: Path, channels: int) -> None:
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    for number in range(3):
        gallery.add(number, picture(50 * number, channels))
    gallery.write_grid(tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    cell = 64  # 8 px, enlarged
    assert grid.shape[1] == 2 * (cell + MARGIN) + MARGIN
    row = (grid.shape[0] - MARGIN) // 2
    for number in range(3):
        bottom = MARGIN + row * (number // 2 + 1) - MARGIN - 1
        left = MARGIN + (number % 2) * (cell + MARGIN)
        assert (grid[bottom, left : left + cell] == 50 * number).all()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["grid.png"]


def test_large_pictures_keep_their_size() -> None:
    grid = draw_grid(np.zeros((1, 256, 256, 3), np.uint8), [""])
    assert grid.size[0] == 256 + 2 * MARGIN
