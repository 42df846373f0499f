"""Sets of images on disk: both kinds read alike, and everything that is no set of images is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dexport.errors import DexportError
from dexport.validate.images import open_images

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
