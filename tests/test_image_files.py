"""Pictures of others: what is read, what is refused by name, and what never happens while they are looked at."""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dexport.errors import InputError
from dexport.image_files import LARGEST_PIXELS, find_images, read_header, read_image, text_of_png

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    image.putalpha(alpha)
    return image


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of any chunks, with right checksums."""
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_of(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


RIGHT: dict[str, tuple[bytes, np.ndarray]] = {
    "grey.png": (encoded(Image.fromarray(GREYS), "PNG"), GREYS[..., None]),
    "colour.PNG": (encoded(Image.fromarray(COLOURS), "PNG"), COLOURS),
    "lossless.webp": (encoded(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS),
    "png called jpg.jpg": (encoded(Image.fromarray(COLOURS), "PNG"), COLOURS),
    "opaque.png": (encoded(with_alpha(Image.fromarray(COLOURS), 255), "PNG"), COLOURS),
    "opaque grey.png": (encoded(with_alpha(Image.fromarray(GREYS), 255), "PNG"), GREYS[..., None]),
    "one bit.png": (
        encoded(Image.fromarray(GREYS).point(lambda level: 255 * (level > 99)).convert("1"), "PNG"),
        np.where(GREYS > 99, 255, 0).astype(np.uint8)[..., None],
    ),
    "palette.png": (
        encoded(Image.fromarray(COLOURS).quantize(4), "PNG"),
        np.asarray(Image.fromarray(COLOURS).quantize(4).convert("RGB")),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_pixels_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    content, pixels = RIGHT[name]
    (tmp_path / name).write_bytes(content)
    image = read_image(tmp_path / name)
    assert (image.dtype, image.shape) == (np.uint8, pixels.shape)
    np.testing.assert_array_equal(image, pixels)
    assert read_header(tmp_path / name).shape == pixels.shape
    assert find_images(tmp_path).files == (tmp_path / name,)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg_is_read(tmp_path: Path, suffix: str) -> None:
    smooth = np.full((16, 16, 3), 77, np.uint8)
    (tmp_path / f"a.{suffix}").write_bytes(encoded(Image.fromarray(smooth), "JPEG", quality=95))
    np.testing.assert_allclose(read_image(tmp_path / f"a.{suffix}").astype(int), smooth, atol=2)


def frames(form: str) -> bytes:
    pictures = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    return encoded(pictures[0], form, save_all=True, append_images=pictures[1:], duration=50)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


COLOUR = RIGHT["colour.PNG"][0]
WRONG: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "not a whole PNG, JPEG or WebP"),
    "text.png": (b"no picture", "not a whole PNG"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not a whole PNG"),
    "tiff.png": (encoded(Image.fromarray(COLOURS), "TIFF"), "not a whole PNG"),
    "gif.png": (encoded(Image.fromarray(GREYS), "GIF"), "not a whole PNG"),
    "bmp.webp": (encoded(Image.fromarray(COLOURS), "BMP"), "not a whole PNG"),
    "cut.png": (COLOUR[:-30], "not a whole PNG"),
    "without an end.png": (COLOUR[:-12], "not a whole PNG"),
    "one bit is wrong.png": (flipped(COLOUR, len(COLOUR) - 30), "not a whole PNG"),
    "cut.jpg": (encoded(Image.fromarray(np.tile(COLOURS, (9, 9, 1))), "JPEG")[:-300], "not a whole PNG"),
    "cut.webp": (encoded(Image.fromarray(COLOURS), "WEBP", lossless=True)[:-20], "not a whole PNG"),
    "no width.png": (png_of(0, 4), "not a whole PNG|0x4 pixels"),
    "bomb.png": (png_of(20_000, 10_000, rows=bytes(1000)), "20000x10000|200000000 pixels"),
    "large bomb.png": (png_of(60_000, 60_000, rows=bytes(1000)), "pixels"),
    "transparent.png": (encoded(with_alpha(Image.fromarray(COLOURS), 254), "PNG"), "is RGBA with transparent pixels"),
    "transparent grey.png": (encoded(with_alpha(Image.fromarray(GREYS), 0), "PNG"), "is LA with transparent pixels"),
    "transparent.webp": (encoded(with_alpha(Image.fromarray(COLOURS), 9), "WEBP", lossless=True), "is RGBA"),
    "transparent palette.png": (
        encoded(Image.fromarray(COLOURS).quantize(4), "PNG", transparency=0),
        "is P with transparent pixels",
    ),
    "colour key.png": (
        encoded(Image.fromarray(COLOURS), "PNG", transparency=tuple(COLOURS[0, 0].tolist())),
        "is RGB with transparent pixels",
    ),
    "deep grey.png": (encoded(Image.fromarray(GREYS.astype(np.uint16)), "PNG"), "is I;16"),
    "deep.png": (png_of(2, 2, 16, rows=(b"\0" + bytes(range(12))) * 2), "16 bits"),
    "deep with alpha.png": (png_of(2, 2, 16, 6, rows=(b"\0" + bytes(range(16))) * 2), "16 bits"),
    "cmyk.jpg": (encoded(Image.new("CMYK", (8, 8)), "JPEG"), "is CMYK"),
    "moving.png": (frames("PNG"), "2 frames"),
    "moving.webp": (frames("WEBP"), "2 frames"),
    "text bomb.png": (
        png(
            (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))),
            (b"IDAT", zlib.compress(bytes(4))),
            (b"IEND", b""),
        ),
        "not a whole PNG",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_need_a_decision_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        read_image(tmp_path / name)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("name", ["00000.png", "a.jpg", "b.webp"])
@pytest.mark.parametrize("read", [read_image, read_header, lambda path: text_of_png(path, "dexport")])
def test_no_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path], object]
) -> None:
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho ran >> {tmp_path / 'mark'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / name).write_bytes(WRONG["postscript.png"][0])
    if read in (read_image, read_header):
        with pytest.raises(InputError):
            read(tmp_path / name)
    else:
        assert read(tmp_path / name) is None
    assert not (tmp_path / "mark").exists()


def test_the_bound_is_of_pixels_and_not_of_bytes(tmp_path: Path) -> None:
    side = int(LARGEST_PIXELS**0.5)
    (tmp_path / "a.png").write_bytes(png_of(side, side + 1))
    with pytest.raises(InputError, match=f"{side}x{side + 1} pixels"):
        read_header(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png_of(side, side))
    assert read_header(tmp_path / "b.png").shape == (side, side, 3)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "missing"])
def test_special_files_are_never_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()
    elif kind == "device":
        path.symlink_to("/dev/zero")  # reading it would never end
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=r"not a regular file|cannot be read"):
        read_image(path)
    if kind not in ("folder", "missing"):
        (skipped,) = find_images(tmp_path).skipped
        assert (skipped.why, skipped.names) == ("no regular files", ("a.png",))


def test_a_name_is_printed_without_its_control_characters(tmp_path: Path) -> None:
    for name in ("\x1b]0;title\x07.png", "line\nbreak.png"):
        (tmp_path / name).write_bytes(b"no picture")
        with pytest.raises(InputError) as refused:
            read_image(tmp_path / name)
        assert not {"\x1b", "\x07", "\n"} & set(str(refused.value))
        (tmp_path / name).rename(tmp_path / f"{name}.txt")
    assert str(find_images(tmp_path).skipped[0]).isprintable()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, True), (6, True), (99, False)])
def test_orientation_is_told_and_not_applied(tmp_path: Path, form: str, orientation: int, turned: bool) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOURS), form, exif=exif))
    header = read_header(tmp_path / "a.png")
    assert (header.shape, header.turned) == (COLOURS.shape, turned)
    assert read_image(tmp_path / "a.png").shape == COLOURS.shape


def test_damaged_metadata_turns_nothing(tmp_path: Path) -> None:
    for content in (b"", b"MM", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20)):
        (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(COLOURS), "JPEG", exif=content))
        assert read_header(tmp_path / "a.jpg").turned is False


def test_what_is_skipped_is_named_and_counted(tmp_path: Path) -> None:
    content = COLOUR
    for name in (
        "1.png",
        "2.PNG",
        "3.jpg",
        "4.JPeG",
        "5.WebP",
        "below/deep/6.png",
        ".ipynb_checkpoints/1-checkpoint.png",
        ".hidden.png",
        "below/._6.png",
        "__MACOSX/1.png",
        "Thumbs/1.png",
        "@eaDir/1.png",
        "a.gif",
        "b.txt",
        "Thumbs.db",
        "run.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "itself.png").symlink_to("itself.png")
    found = find_images(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == [
        "1.png",
        "2.PNG",
        "3.jpg",
        "4.JPeG",
        "5.WebP",
        "below/deep/6.png",
    ]
    assert {skipped.why: (skipped.count, skipped.names) for skipped in found.skipped} == {
        "hidden": (3, (".hidden.png", ".ipynb_checkpoints/", "below/._6.png")),
        "of a file manager": (3, ("@eaDir/", "Thumbs/", "__MACOSX/")),
        "no PNG, JPEG or WebP files": (4, ("Thumbs.db", "a.gif", "b.txt", "run.json")),
        "links to nothing": (2, ("gone.png", "itself.png")),
    }


def test_linked_folders_count_once_and_loops_end(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "more").mkdir(parents=True)
    (outside / "more" / "1.png").write_bytes(COLOUR)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "not of the set.png").write_bytes(COLOUR)
    root = tmp_path / "set"
    (root / "own").mkdir(parents=True)
    (root / "own" / "2.png").write_bytes(COLOUR)
    (root / "a link to own").symlink_to("own")
    (root / "linked").symlink_to(outside)
    (root / "linked again").symlink_to(outside)
    (root / "own" / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (outside / "more" / "loop").symlink_to(outside)
    (root / "one.png").symlink_to(outside / "more" / "1.png")
    found = find_images(root)
    names = [file.relative_to(root).as_posix() for file in found.files]
    assert names == ["linked/more/1.png", "one.png", "own/2.png"]
    assert [(skipped.why, skipped.count) for skipped in found.skipped] == [
        ("links to folders that were read already", 5)
    ]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    listed = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"below cannot be listed: Permission denied"):
        find_images(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(COLOUR)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"a\.png cannot be read: Permission denied"):
        read_image(tmp_path / "a.png")


def test_a_fifo_that_takes_the_place_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at as a file, opened as a FIFO: it is noticed, and nothing waits for its writer."""
    (tmp_path / "a.png").write_bytes(COLOUR)
    regular = (tmp_path / "a.png").stat()
    assert stat.S_ISREG(regular.st_mode)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr(Path, "stat", lambda *_, **__: regular)
    with pytest.raises(InputError, match="Not a regular file"):
        read_image(tmp_path / "a.png")
