"""Sets of images on disk: both kinds read alike, and everything that is no set of images is refused by name."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dexport.errors import DexportError, InputError
from dexport.validate.images.image_sets import open_images
from dexport.validate.images.sampled_sets import fingerprint
from tests.validate.mutations import read_mutated_npz, read_mutated_picture

RNG = np.random.default_rng(0)


def write_folder(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path / f"{number:05d}.png")
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_file_hold_the_same(tmp_path: Path, channels: int) -> None:
    images = RNG.integers(0, 256, (5, 6, 8, channels), dtype=np.uint8)
    np.savez_compressed(tmp_path / "set.npz", images)
    for path in (write_folder(tmp_path / "set", images), tmp_path / "set.npz"):
        opened = open_images(path)
        assert (opened.count, opened.shape) == (5, (6, 8, channels))
        batches = list(opened.batches(2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(batches), images)


def test_folders_below_count_and_palettes_are_colours(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    colours = Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).quantize(4)
    colours.save(tmp_path / "a" / "0.png")
    (opened,) = open_images(tmp_path).batches(1)
    np.testing.assert_array_equal(opened[0], np.asarray(colours.convert("RGB")))


def save_image(path: Path, mode: str, size: tuple[int, int] = (4, 4)) -> None:
    Image.new(mode, size).save(path)


def test_what_is_no_set_of_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, modes in {"transparent": ("RGBA",), "deep": ("I;16",), "mixed": ("RGB", "L")}.items():
        (tmp_path / name).mkdir()
        for number, mode in enumerate(modes):
            save_image(tmp_path / name / f"{number}.png", mode)
    (tmp_path / "sizes").mkdir()
    save_image(tmp_path / "sizes" / "0.png", "RGB")
    save_image(tmp_path / "sizes" / "1.png", "RGB", (5, 4))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no picture")
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3), np.float32))
    np.savez(tmp_path / "four.npz", np.zeros((2, 4, 4, 4), np.uint8))
    np.savez(tmp_path / "fortran.npz", np.zeros((2, 4, 4, 3), np.uint8, order="F"))
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "zip.npz").write_bytes(b"no zip")
    save_image(tmp_path / "one.png", "RGB")
    for name, message in {
        "empty": "holds no PNG files",
        "transparent": "is RGBA",
        "deep": "is I;16",
        "mixed": "1.png is 4x4 with 1 channels, but .*0.png is 4x4 with 3",
        "sizes": "1.png is 4x5 with 3 channels",
        "broken": "not a whole PNG",
        "float.npz": "arr_0 is float32",
        "four.npz": r"\[2, 4, 4, 4\]",
        "fortran.npz": "Fortran order",
        "other.npz": "holds no images",
        "zip.npz": "holds no images",
        "one.png": "neither a folder nor",
        "missing": "does not exist",
    }.items():
        with pytest.raises(DexportError, match=message):
            list(open_images(tmp_path / name).batches(8))


def test_file_that_is_cut_short(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", RNG.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    data = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(data[:3000] + bytes(len(data[3000:]) - 200) + data[-200:])
    with pytest.raises(DexportError, match=r"set\.npz"):
        list(open_images(tmp_path / "set.npz").batches(8))


def test_all_pictures_count_whatever_their_names(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for image, name in zip(images, ("a.png", "b.PNG", "c.webp", "d/e.WebP", "f.Png", "g.png"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        form = name.rpartition(".")[2].upper()
        Image.fromarray(image).save(tmp_path / name, form, **({"lossless": True} if form == "WEBP" else {}))
    for number in range(20):
        Image.fromarray(images[0]).save(tmp_path / f"{number}.jpg", "JPEG")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(images[0]).save(tmp_path / ".ipynb_checkpoints" / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    opened = open_images(tmp_path)
    assert opened.count == sum(map(len, opened.batches(7))) == 26
    assert [(one.why, one.count, one.names) for one in opened.skipped] == [
        ("hidden", 1, (".ipynb_checkpoints/",)),
        ("no PNG, JPEG or WebP files", 1, ("notes.txt",)),
    ]
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").unlink()
    assert fingerprint(tmp_path) == before
    (tmp_path / "19.jpg").unlink()
    assert fingerprint(tmp_path) != before


def test_a_name_that_is_no_text_has_a_fingerprint(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("L", (4, 4)).save(os.fsdecode(path))
    assert open_images(tmp_path).count == 1
    assert len(fingerprint(tmp_path)) == 64


def test_turned_pictures_are_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.jpg", **({"exif": exif} if number else {}))
    (warning,) = open_images(tmp_path).warnings
    assert "2 images have an EXIF orientation, which is not applied" in warning


def test_large_images_come_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dexport.validate.images.image_sets.LARGEST_BATCH", 250)
    images = RNG.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    for path in (write_folder(tmp_path / "set", images), tmp_path / "a.npz"):
        batches = list(open_images(path).batches(100))
        assert [len(batch) for batch in batches] == [3, 2]
        np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize(
    "shape", [(0, 8, 8, 3), (3, 0, 8, 3), (8, 8, 3), (8, 8), (2, 8, 8, 2), (2, 1, 1, 1, 3), (2, 8, 8, 0), ()]
)
def test_arrays_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=r"a\.npz: arr_0 is uint8"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["int8", "uint16", "float32", "bool", "complex64", "U1"])
def test_arrays_of_another_type(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8, 3), dtype))
    with pytest.raises(InputError, match=r"a\.npz"):
        open_images(tmp_path / "a.npz")


def test_the_name_of_an_archive_may_be_in_capitals(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert open_images(tmp_path / "A.NPZ").count == 2
    assert zipfile.is_zipfile(tmp_path / "A.NPZ")


def test_mutated_pictures(tmp_path: Path) -> None:
    for number in range(300):
        read_mutated_picture(random.Random(number), tmp_path)


def test_mutated_arrays(tmp_path: Path) -> None:
    for number in range(120):
        read_mutated_npz(random.Random(number), tmp_path)
