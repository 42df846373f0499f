"""Folders of pictures: resumed when the settings are the same, refused when they are not."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dexport.bundle import load_bundle
from dexport.errors import InputError, MachineError, UsageError
from dexport.runtime.gallery import MARGIN, Gallery, draw_grid, open_gallery
from tests.runtime.mutations import read_mutated_record

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


OTHER = {"seed": 1, "labels": [1, 2, 3, 4, 5]}
"""A run whose record lists five pictures."""


def made(folder: Path, settings: dict[str, object] = SETTINGS) -> Gallery:
    gallery = Gallery(folder, settings, [""] * len(settings["labels"]))  # type: ignore[arg-type]
    for number in gallery.missing():
        gallery.add(number, picture(40 + number))
    return gallery


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def exchange_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-25] ^= 1
    path.write_bytes(content)


def save(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "a wrong bit": exchange_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("mine"),
    "postscript": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    "another size": lambda path: save(path, np.zeros((4, 4, 3), np.uint8)),
    "another size, grey": lambda path: save(path, np.zeros((8, 8), np.uint8)),
    "same size": lambda path: save(path, picture(7)),
    "another picture of the run": lambda path: path.write_bytes(path.with_name("00002.png").read_bytes()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_cut_and_foreign_pictures_are_made_again(tmp_path: Path, name: str) -> None:
    before = made(tmp_path / "g").images()
    DAMAGES[name](tmp_path / "g" / "00001.png")
    again = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    assert again.missing() == [1]
    np.testing.assert_array_equal(made(tmp_path / "g").images(), before)
    assert names(tmp_path / "g") == ["00000.png", "00001.png", "00002.png", "run.json"]


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_no_file_is_set_aside_and_not_followed(tmp_path: Path, kind: str) -> None:
    made(tmp_path / "g")
    (tmp_path / "victim.png").write_bytes((tmp_path / "g" / "00001.png").read_bytes())
    path = tmp_path / "g" / "00001.png"
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "victim.png")
    elif kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        os.mkfifo(path)
    before = (tmp_path / "victim.png").read_bytes()
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    assert (gallery.missing(), gallery.set_aside) == ([1], ("00001.png.foreign",))
    assert made(tmp_path / "g").images().shape == (3, 8, 8, 3)
    assert (tmp_path / "victim.png").read_bytes() == before
    assert os.path.lexists(tmp_path / "g" / "00001.png.foreign")


MINE = ["2024-holiday.png", "7.pdf", "0.png", "00005.png", "00099.png", "00001.PNG", "00001.png.bak", "00001.partial"]


def test_force_removes_what_the_record_lists_and_nothing_else(tmp_path: Path) -> None:
    made(tmp_path / "g", OTHER)
    for name in MINE:
        (tmp_path / "g" / name).write_text("mine")
    cut(tmp_path / "g" / "00003.png")
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS, force=True)
    assert names(tmp_path / "g") == sorted([*MINE, "run.json"])
    assert gallery.set_aside == ()
    made(tmp_path / "g")
    assert all((tmp_path / "g" / name).read_text() == "mine" for name in MINE)


def test_a_file_that_no_record_lists_is_set_aside(tmp_path: Path) -> None:
    """It lies where the larger run has a picture."""
    made(tmp_path / "g")
    for name in ("00003.png", "00004.png.foreign"):
        (tmp_path / "g" / name).write_text("mine")
    save(tmp_path / "g" / "00004.png", picture(9))
    gallery = Gallery(tmp_path / "g", OTHER, [""] * 5, force=True)
    assert sorted(gallery.set_aside) == ["00003.png.foreign", "00004.png.foreign.foreign"]
    assert made(tmp_path / "g", OTHER).images().shape == (5, 8, 8, 3)
    assert (tmp_path / "g" / "00003.png.foreign").read_text() == "mine"
    assert (tmp_path / "g" / "00004.png.foreign").read_text() == "mine"
    assert np.asarray(Image.open(tmp_path / "g" / "00004.png.foreign.foreign")).max() == 9


@pytest.mark.parametrize(
    "record",
    [
        {"labels": ["../victim.png"] * 3},
        {"labels": 3, "pictures": ["../victim.png", "holiday.png", "/etc/hostname"]},
        {"labels": {"0": 1}},
        {"name": "another program"},
        {"labels": [[]] * 2, "folder": ".."},
    ],
)
def test_a_foreign_record_names_no_files(tmp_path: Path, record: dict[str, object]) -> None:
    (tmp_path / "g").mkdir()
    for name in ("victim.png", "g/holiday.png"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "g" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="other settings"):
        Gallery(tmp_path / "g", SETTINGS, CAPTIONS)
    assert Gallery(tmp_path / "g", SETTINGS, CAPTIONS, force=True).missing() == [0, 1, 2]
    for name in ("victim.png", "g/holiday.png"):
        assert (tmp_path / name).read_text() == "mine"


def test_a_link_that_the_record_lists_is_removed_and_not_followed(tmp_path: Path) -> None:
    made(tmp_path / "g", OTHER)
    (tmp_path / "victim.png").write_text("mine")
    (tmp_path / "g" / "00004.png").unlink()
    (tmp_path / "g" / "00004.png").symlink_to(tmp_path / "victim.png")
    Gallery(tmp_path / "g", SETTINGS, CAPTIONS, force=True)
    assert (tmp_path / "victim.png").read_text() == "mine"
    assert not os.path.lexists(tmp_path / "g" / "00004.png")


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"seed": 0, "lab', b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b"\0" * 99]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_record_that_cannot_be_read_does_not_block(tmp_path: Path, content: bytes, force: bool) -> None:
    before = made(tmp_path / "g").images()
    (tmp_path / "g" / "run.json").write_bytes(content)
    cut(tmp_path / "g" / "00001.png")
    gallery = Gallery(tmp_path / "g", SETTINGS, CAPTIONS, force=force)
    assert gallery.missing() == [1]
    assert json.loads((tmp_path / "g" / "run.json").read_text()) == SETTINGS
    np.testing.assert_array_equal(made(tmp_path / "g").images(), before)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_record_that_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    made(tmp_path / "g")
    record = tmp_path / "g" / "run.json"
    record.rename(tmp_path / "victim.json")
    if kind == "link":
        record.symlink_to(tmp_path / "victim.json")
    elif kind == "folder":
        record.mkdir()
    else:
        os.mkfifo(record)
    before = (tmp_path / "victim.json").read_bytes()
    with pytest.raises(UsageError, match="holds no samples"):
        Gallery(tmp_path / "g", OTHER, [""] * 5, force=True)
    assert (tmp_path / "victim.json").read_bytes() == before


def test_a_picture_that_changes_before_the_grid(tmp_path: Path) -> None:
    gallery = made(tmp_path / "g")
    save(gallery.path(1), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"00001\.png has another size"):
        gallery.write_grid(tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_two_cannot_fill_one_folder(tmp_path: Path) -> None:
    with open_gallery(tmp_path / "g", SETTINGS, CAPTIONS) as gallery:
        gallery.add(0, picture(1))
        for force in (False, True):
            with (
                pytest.raises(UsageError, match="is being filled by another run"),
                open_gallery(tmp_path / "g", OTHER, [""] * 5, force=force),
            ):
                pass
        assert gallery.missing() == [1, 2]
    with open_gallery(tmp_path / "g", OTHER, [""] * 5, force=True) as gallery:
        assert gallery.missing() == [0, 1, 2, 3, 4]


def test_drafts_of_a_killed_run_go_and_nothing_in_a_folder_of_others(tmp_path: Path) -> None:
    draft = ".00001.png.partial-0123abcd"
    for name in ("g", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / draft).write_bytes(b"half")
    (tmp_path / "g" / "run.json").write_text(json.dumps(SETTINGS))
    with open_gallery(tmp_path / "g", SETTINGS, CAPTIONS):
        assert names(tmp_path / "g") == ["run.json"]
    with pytest.raises(UsageError, match="holds no samples"), open_gallery(tmp_path / "mine", SETTINGS, CAPTIONS):
        pass
    assert names(tmp_path / "mine") == [draft]


def test_mutated_records(tmp_path: Path) -> None:
    for number in range(200):
        read_mutated_record(random.Random(number), tmp_path)
