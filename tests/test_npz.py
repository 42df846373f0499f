"""Arrays of others: what numpy writes is read, and nothing is unpacked that does not fit what its header says."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dexport.errors import InputError
from dexport.npz import open_npz


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def header(shape: object, descr: object = "<f4", order: object = False) -> bytes:
    """Of an array, whatever it says."""
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def read(path: Path, name: str = "a", **options: Any) -> np.ndarray:
    with open_npz(path, "numbers") as file:
        return file.read(name, **options)


ARRAYS = {
    "floats": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(6, dtype=">i4").reshape(3, 2),
    "a number": np.array(7),
    "text": np.array("pixels"),
    "nothing": np.zeros((0, 3), np.float32),
    "bytes": np.arange(256, dtype=np.uint8),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_what_numpy_writes(tmp_path: Path, name: str, compressed: bool) -> None:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", a=ARRAYS[name])
    found = read(tmp_path / "a.npz")
    np.testing.assert_array_equal(found, ARRAYS[name])
    assert (found.shape, found.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype.newbyteorder("="))


def test_large_files_of_the_format_and_its_second_version(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file, file.open("a.npy", "w", force_zip64=True) as member:
        member.write(npy(np.arange(5.0), (2, 0)))
    np.testing.assert_array_equal(read(path), np.arange(5.0))


def objects() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([{"a": 1}], dtype=object))
    return file.getvalue()


MEMBERS: dict[str, tuple[bytes, str]] = {
    "an object": (objects(), "not numbers"),
    "a pickle": (pickle.dumps({"a": 1}), "magic"),
    "empty": (b"", "EOF"),
    "cut header": (header((2,))[:20], "EOF"),
    "no values": (header((2,)), "8 bytes, and the file has 0"),
    "cut values": (header((4,)) + bytes(15), "16 bytes, and the file has 15"),
    "more values": (header((4,)) + bytes(17), "16 bytes, and the file has 17"),
    "records": (npy(np.zeros(2, [("x", "f4")])), "not numbers"),
    "dates": (npy(np.zeros(2, "M8[s]")), "not numbers"),
    "texts of no length": (header((1 << 60,), "<U0"), "not numbers"),
    "larger than memory": (header((1 << 50, 1 << 50)), "and the file has 0"),
    "negative": (header((-2, 3)), "shape"),
    "true": (header((True, 3)) + bytes(12), "shape"),
    "no tuple": (header([2, 3]), "numbers: "),
    "an expression": (header((2,)).replace(b"False", b"[]+[]"), "numbers: "),
    "nested": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 9000, "numbers: "),
    "a long header": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + bytes(1 << 20), "numbers: "),
    "another version": (b"\x93NUMPY\x09\x00" + bytes(100), "version"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_that_are_no_arrays(tmp_path: Path, name: str) -> None:
    content, message = MEMBERS[name]
    path = archive(tmp_path / "bad.npz", ("a.npy", content))
    with pytest.raises(InputError, match=message) as refused:
        read(path)
    assert "bad.npz" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "fifo.npz")
    whole = archive(tmp_path / "cut.npz", ("a.npy", npy(np.arange(1000.0))))
    whole.write_bytes(whole.read_bytes()[:-30])
    directory = archive(tmp_path / "directory.npz", ("a.npy", npy(np.zeros(3))))
    content = bytearray(directory.read_bytes())
    content[content.index(b"PK\x01\x02") + 2] ^= 0xFF
    directory.write_bytes(content)
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(tmp_path / "twice.npz", ("a.npy", npy(np.zeros(3))), ("a.npy", npy(np.ones(3))))
    archive(tmp_path / "lzma.npz", ("a.npy", npy(np.zeros(3))), method=zipfile.ZIP_LZMA)
    archive(tmp_path / "other.npz", ("b.npy", npy(np.zeros(3))), ("a", npy(np.zeros(3))))
    names = ["array", "empty", "text", "folder", "fifo", "cut", "directory", "twice", "lzma", "other", "missing"]
    for name in names:
        with pytest.raises(InputError, match=rf"{name}\.npz holds no numbers: ") as refused:
            read(tmp_path / f"{name}.npz")
        assert "\n" not in str(refused.value)


def test_an_encrypted_member(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", ("a.npy", npy(np.zeros(3))))
    content = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + at] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no numbers"):
        read(path)


@pytest.mark.parametrize("where", ["in the middle", "at the end"])
def test_values_that_changed(tmp_path: Path, where: str) -> None:
    path = archive(tmp_path / "a.npz", ("a.npy", npy(np.arange(4000.0))), method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[8000 if where == "in the middle" else content.index(b"PK\x01\x02") - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no numbers: Bad CRC"):
        read(path)


@pytest.mark.parametrize(("shape", "descr"), [((1 << 23,), "|u1"), ((1 << 10, 1 << 10), "<f8"), ((1 << 20,), "<f8")])
def test_bombs_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], descr: str
) -> None:
    monkeypatch.setattr("dexport.npz.BOMB_BYTES", 1 << 22)
    path = archive(tmp_path / "a.npz", ("a.npy", header(shape, descr) + bytes(1 << 23)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="would unpack from"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_a_size_that_is_only_claimed(tmp_path: Path) -> None:
    """6 GB by its directory, none in the file."""
    path = archive(tmp_path / "a.npz", ("a.npy", header((6 << 30,), "|u1") + bytes(100)), method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFFE, 0xFFFFFFFE)
    path.write_bytes(content)
    with pytest.raises(InputError):
        read(path)


def test_a_caller_bounds_what_it_reads(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(100))
    assert read(tmp_path / "a.npz", largest=800).shape == (100,)
    with pytest.raises(InputError, match="800 bytes; 799 are read at most"):
        read(tmp_path / "a.npz", largest=799)


@pytest.mark.parametrize("point", [0x110000, 0x1FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(), (2,)])
def test_text_of_code_points_that_do_not_exist(tmp_path: Path, point: int, order: str, shape: tuple[int, ...]) -> None:
    text = np.full((*shape, 1), point, f"{order}u4").view(f"{order}U1").reshape(shape)
    np.savez(tmp_path / "x.npz", x=text)
    with open_npz(tmp_path / "x.npz", "statistics") as file, pytest.raises(InputError, match="no text"):
        file.read("x")
