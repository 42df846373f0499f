"""PyTorch files of every form, byte for byte what torch.load gives; what could be read in two ways is refused."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dexport.errors import InputError
from dexport.exporter.steps import peak_rss_bytes, reset_peak_rss
from dexport.exporter.weights import unpickle
from dexport.exporter.weights.loading import open_file

BASE = torch.arange(24, dtype=torch.float32) + 0.1
FLAT = torch.randn(3000, generator=torch.Generator().manual_seed(0))
TENSORS: dict[str, Tensor] = {
    **{
        str(dtype): (BASE * 3).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    },
    **{str(dtype): (BASE * 3).to(dtype) for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool)},
    **{str(dtype): (BASE * 3).to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)},
    **{str(dtype): BASE.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)},
    "complex64": torch.complex(BASE, -BASE),
    "complex128": torch.complex(BASE.double(), -BASE.double()),
    "transposed": BASE.view(4, 6).t(),
    "every second": BASE[1::2],
    "diagonal": BASE[:16].view(4, 4).diagonal(),
    "expanded": BASE[:3].expand(4, 3),
    "window": BASE.as_strided((4, 3), (2, 1), 5),
    "scalar": torch.tensor(2.5),
    "scalar view": BASE[7],
    "empty": torch.empty(0, 3),
    "empty view": BASE[4:4],
    "parameter": nn.Parameter(BASE * 2),
    "buffer": nn.Buffer(BASE * 2),
    "negative": torch.complex(BASE, BASE).conj().imag,
    "conjugate": torch.complex(BASE, BASE).conj(),
    "conjugate view": torch.complex(BASE, BASE).view(4, 6).conj().t()[1:3],
    "flat 1": FLAT[:1000].view(10, 100),
    "flat 2": FLAT[1000:2000].view(100, 10).t(),
    "flat 3": FLAT[2999:],
}


TYPED = {name: tensor for name, tensor in TENSORS.items() if not name.startswith(("torch.uint", "torch.float8"))}
"""Without those that PyTorch keeps in storages of plain bytes, which it cannot load from its old format."""


def save(path: Path, value: Any = TENSORS, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rewritten(
    path: Path,
    edit: Callable[[dict[str, bytes]], dict[str, bytes]] = dict,
    compression: int = zipfile.ZIP_STORED,
    **options: Any,
) -> Path:
    """The archive as Python's zipfile writes it, its members edited."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in edit(members).items():
            with archive.open(name, "w", **options) as member:
                member.write(content)
    return path


def without(*endings: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda members: {name: data for name, data in members.items() if not name.endswith(endings)}


def index_first(members: dict[str, bytes]) -> dict[str, bytes]:
    return dict(sorted(members.items(), key=lambda item: not item[0].endswith("data.pkl")))


def with_comment(path: Path) -> Path:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"the best epoch"
    return path


def big_endian(path: Path) -> Path:
    """As a big-endian machine writes it: torch.load turns each storage round by its type."""
    return rewritten(path, lambda members: members | {next(n for n in members if "byteorder" in n): b"big"})


FORMS: dict[str, Callable[[Path], Path]] = {
    "as saved": save,
    "legacy": lambda path: save(path, TYPED, _use_new_zipfile_serialization=False),
    "protocol 3": lambda path: save(path, pickle_protocol=3),
    "ordered": lambda path: save(path, OrderedDict(TENSORS)),
    "zipfile": lambda path: rewritten(save(path)),
    "zip64": lambda path: rewritten(save(path), force_zip64=True),
    "reversed": lambda path: rewritten(save(path), lambda members: dict(reversed(members.items()))),
    "index first": lambda path: rewritten(save(path), index_first),
    "index last": lambda path: rewritten(save(path), lambda members: dict(reversed(index_first(members).items()))),
    "no byte order": lambda path: rewritten(save(path), without("byteorder")),
    "no alignment": lambda path: rewritten(save(path), without(".storage_alignment", ".format_version")),
    "only what is needed": lambda path: rewritten(save(path), without("t_version", "serialization_id", "alignment")),
    "more members": lambda path: rewritten(
        save(path), lambda m: index_first(m) | {f"{next(iter(m)).split('/')[0]}/extra/notes.json": b"{}"}
    ),
    "a comment": lambda path: with_comment(rewritten(save(path))),
}


def assert_as_torch_loads(path: Path) -> None:
    with path.open("rb") as file:
        expected = torch.load(file, weights_only=True)
    source = open_file(path)
    assert set(source.shapes) == set(expected)
    for name, tensor in expected.items():
        got = source._read(name)
        wanted = tensor.detach().resolve_conj().resolve_neg()
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        assert source.shapes[name] == tuple(wanted.shape)
        assert bits(got) == bits(wanted), name


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_torch_loads_it(tmp_path: Path, form: str) -> None:
    assert_as_torch_loads(FORMS[form](tmp_path / "w.pt"))


@pytest.mark.parametrize("name", [*TYPED, "torch.uint8"])
def test_big_endian_files_are_turned_round(tmp_path: Path, name: str) -> None:
    assert_as_torch_loads(big_endian(save(tmp_path / "w.pt", {"a": TENSORS[name]})))


@pytest.mark.parametrize("name", ["torch.float8_e5m2", "torch.uint16"])
def test_big_endian_storages_without_a_type_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="big-endian machine"):
        open_file(big_endian(save(tmp_path / "w.pt", {"a": TENSORS[name]})))


def test_members_that_are_gone_move_the_others(tmp_path: Path) -> None:
    """Offsets follow the archive, not the order in which torch would have written it."""
    tensors = {f"t{n}": torch.full((n * 17 + 3,), float(n)).bfloat16() for n in range(20)}
    path = save(tmp_path / "w.pt", {"model": tensors, "opt": {"state": {0: {"exp_avg": torch.ones(999)}}}})
    rewritten(path, without("/data/20"))
    source = open_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(source._read(name), tensor)


@pytest.mark.parametrize("name", ["notes.md", "notes/readme.md"])
def test_a_member_in_another_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    path = rewritten(save(tmp_path / "w.pt", {"a": BASE}), lambda members: members | {name: b"# weights"})
    assert torch.equal(open_file(path)._read("a"), BASE)


# A flat storage that many views share


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_of_a_shared_storage_only_the_view_is_read(tmp_path: Path, legacy: bool) -> None:
    size, count = 1 << 14, 1 << 10
    flat = torch.arange(size * count, dtype=torch.float32)
    views = {f"v{n}": flat[n * size : (n + 1) * size].view(128, -1) for n in range(count)}
    path = save(tmp_path / "w.pt", views, _use_new_zipfile_serialization=not legacy)
    source = open_file(path)
    read: list[int] = []
    (file,) = source._files  # type: ignore[attr-defined]
    whole = file.read_at
    file.read_at = lambda offset, length: read.append(length) or whole(offset, length)
    for name, view in list(views.items())[::100]:
        assert torch.equal(source._read(name), view)
    assert set(read) == {size * 4}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc")
def test_the_old_format_is_read_in_parts_too(tmp_path: Path) -> None:
    size = 8 << 20
    path = save(
        tmp_path / "w.pt",
        {f"t{n}": torch.full((size // 4,), float(n)) for n in range(8)},
        _use_new_zipfile_serialization=False,
    )
    reset_peak_rss()
    before = peak_rss_bytes()
    source = open_file(path)
    for n in range(8):
        assert source.read(f"t{n}", torch.float32)[-1] == n
    assert peak_rss_bytes() - before < 4 * size  # one tensor and its copy; the file is eight


# What could be read in two ways


def twice(path: Path, name: str, content: bytes, *, other_name: str = "") -> Path:
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(zipfile.ZipInfo(other_name or f"{root}/{name}"), content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["data.pkl", "data/0", "DATA.PKL", "Data/0", "byteorder"])
def test_a_member_that_stands_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = rewritten(save(tmp_path / "w.pt", {"a": torch.ones(4)}))
    other = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, other)
    with zipfile.ZipFile(other) as archive:
        content = archive.read(f"archive/{name.lower()}")
    with pytest.raises(InputError, match="stands in it twice"):
        open_file(twice(path, name, content))


def test_a_second_index_in_another_folder_is_refused(tmp_path: Path) -> None:
    path = rewritten(save(tmp_path / "w.pt", {"a": torch.ones(4)}))
    with pytest.raises(InputError, match="two indexes"):
        open_file(twice(path, "", b"", other_name="other/data.pkl"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(tmp_path: Path, compression: int) -> None:
    with pytest.raises(InputError, match=r"is compressed") as caught:
        open_file(rewritten(save(tmp_path / "w.pt"), compression=compression))
    assert "torch.save" in caught.value.hint


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_one_compressed_member_is_refused(tmp_path: Path, member: str) -> None:
    path = save(tmp_path / "w.pt", {"a": torch.zeros(100)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if name.endswith(member) else zipfile.ZIP_STORED
            archive.writestr(name, content, kind)
    with pytest.raises(InputError, match=f"{member} is compressed"):
        open_file(path)


def patched(path: Path, at: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)
    return path


def header_of(path: Path, ending: str) -> tuple[int, int]:
    """Offsets of a member's own header, and of its entry in the directory."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.endswith(ending)]
        entry = data.index(b"PK\x01\x02", archive.start_dir)
        while data[entry + 46 : entry + 46 + len(info.filename)].decode() != info.filename:
            entry = data.index(b"PK\x01\x02", entry + 1)
    return info.header_offset, entry


@pytest.mark.parametrize("place", ["both", "header"])
def test_encrypted_members_are_refused(tmp_path: Path, place: str) -> None:
    path = rewritten(save(tmp_path / "w.pt", {"a": torch.ones(4)}))
    header, entry = header_of(path, "data/0")
    patched(path, header + 6, b"\x01")
    if place == "both":
        patched(path, entry + 8, b"\x01")
    with pytest.raises(InputError, match="encrypted"):
        open_file(path)


@pytest.mark.parametrize(
    ("at", "content"),
    [(30 + 2, b"X"), (8, b"\x08"), (0, b"PK\x07\x08")],
    ids=["name", "compression", "magic"],
)
def test_a_header_that_contradicts_the_directory_is_refused(tmp_path: Path, at: int, content: bytes) -> None:
    path = rewritten(save(tmp_path / "w.pt", {"a": torch.ones(4)}))
    with pytest.raises(InputError, match="another one in its own header"):
        open_file(patched(path, header_of(path, "data/0")[0] + at, content))


@pytest.mark.parametrize("other", ["data/1", "data.pkl", "byteorder"])
def test_members_that_overlap_are_refused(tmp_path: Path, other: str) -> None:
    """A record that is made longer in the directory reaches into the next member."""
    path = rewritten(save(tmp_path / "w.pt", {"a": torch.ones(4), "b": torch.ones(4)}), index_first)
    _, entry = header_of(path, other)
    for at in (entry + 20, entry + 24):
        patched(path, at, struct.pack("<L", 10_000))
    with pytest.raises(InputError, match=r"overlap|reaches into"):
        open_file(path)


@pytest.mark.parametrize("prefix", [b"#!/bin/sh\n", b"PK\x03\x04" + bytes(60)])
def test_bytes_before_the_archive_are_refused(tmp_path: Path, prefix: bytes) -> None:
    path = save(tmp_path / "w.pt")
    path.write_bytes(prefix + path.read_bytes())
    with pytest.raises(InputError):
        open_file(path)


def test_bytes_after_the_archive_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pt")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError):
        open_file(path)


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path, size: int) -> None:
    """It would be read on into the next one."""
    path = save(tmp_path / "w.pt", {"a": torch.ones(4), "b": torch.ones(4)})
    rewritten(path, lambda m: {name: data[:size] if name.endswith("data/0") else data for name, data in m.items()})
    with pytest.raises(InputError, match=rf"data/0 has {size} bytes, and the index says 16"):
        open_file(path)


def test_a_record_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data/1 is not there"):
        open_file(rewritten(save(tmp_path / "w.pt", {"a": torch.ones(4), "b": torch.ones(5)}), without("data/1")))


@pytest.mark.parametrize("order", [b"middle", b"", b"little\n"])
def test_an_unknown_byte_order_is_refused(tmp_path: Path, order: bytes) -> None:
    path = save(tmp_path / "w.pt")
    with pytest.raises(InputError, match="byte order"):
        open_file(rewritten(path, lambda m: {name: order if "byteorder" in name else data for name, data in m.items()}))


# Indexes that lie


class View:
    """Pickles as a view of a storage with any numbers."""

    def __init__(self, offset: Any, shape: Any, stride: Any, storage: Tensor | None = None) -> None:
        storage = torch.ones(8) if storage is None else storage
        self.arguments = (storage.storage(), offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (9,), (1,)),
        (1, (8,), (1,)),
        (0, (2, 4), (5, 1)),
        (-1, (4,), (1,)),
        (0, (-1,), (1,)),
        (7, (4,), (-1,)),
        (0, (1 << 40,), (1,)),
        (0, (1 << 63,), (0,)),
        (0, (1 << 40, 1 << 40), (0, 0)),
        (0, (2,), (1 << 62,)),
        (1 << 62, (1,), (1,)),
        (0, (4,), (1, 1)),
        (0, (4.0,), (1,)),
        (0, [4], [1]),
        (0, "four", "one"),
        (0, (1,) * 100, (1,) * 100),
        (None, (4,), (1,)),
    ],
)
def test_views_beyond_their_storage_are_refused(
    tmp_path: Path, offset: Any, shape: Any, stride: Any, legacy: bool
) -> None:
    path = save(tmp_path / "w.pt", {"a": View(offset, shape, stride)}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"w\.pt"):
        open_file(path)


def edited_index(path: Path, old: bytes, new: bytes) -> Path:
    return rewritten(
        path, lambda m: {name: data.replace(old, new) if "data.pkl" in name else data for name, data in m.items()}
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_storage_of_terabytes_is_refused_before_it_is_allocated(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "w.pt", {"a": torch.ones(77)}, _use_new_zipfile_serialization=not legacy)
    absurd = b"\x8a\x06" + (1 << 42).to_bytes(6, "little")
    if legacy:
        path.write_bytes(path.read_bytes().replace(b"K\x4d", absurd))
    else:
        edited_index(path, b"K\x4d", absurd)
    with pytest.raises(InputError):
        open_file(path)


BOMBS = {
    "deep": b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 50_000 + b"K\x01s.",
    "memo far away": b"\x80\x02}r\xff\xff\xff\xff.",
    "long text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "long array": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"abc.",
    "growing": b"\x80\x02]q\x00" + b"h\x00a" * 1000 + b".",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "no end": b"\x80\x02}",
    "empty stack": b"\x80\x02R.",
    "call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "endless numbers": b"\x80\x02" + b"I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_would_grow_are_refused(tmp_path: Path, bomb: str) -> None:
    path = save(tmp_path / "w.pt", {"a": torch.ones(4)})
    rewritten(path, lambda m: {name: BOMBS[bomb] if "data.pkl" in name else data for name, data in m.items()})
    with pytest.raises(InputError, match=r"w\.pt"):
        open_file(path)


def test_an_index_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "w.pt")
    monkeypatch.setattr("dexport.exporter.weights.torch_file.LARGEST_PICKLE", 100)
    with pytest.raises(InputError, match=r"data\.pkl has \d+ bytes, and 100 is the most"):
        open_file(path)


def test_an_index_has_a_largest_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MOST_STEPS", 50)
    with pytest.raises(InputError, match="larger than any checkpoint's"):
        open_file(save(tmp_path / "w.pt"))


# Formats that are not read, and wrong names


class Tagged(Tensor):
    """A subclass."""


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.ones(3).to_sparse()},
        {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        {"a": torch.ones(3, device="meta")},
        {"a": torch.ones(3).as_subclass(Tagged)},
        {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    ],
    ids=["sparse", "quantised", "meta", "subclass", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, value: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"holds no state dict|needs to run"):
        open_file(save(tmp_path / "w.pt", value))


def test_a_plain_tensor_with_attributes_is_read(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    tensor.partition = "rows"  # type: ignore[attr-defined]
    assert_as_torch_loads(save(tmp_path / "w.pt", {"a": tensor, "b": nn.Parameter(tensor)}))


def test_the_tar_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(InputError, match="is a tar archive"):
        open_file(path)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors", ".dat", ""])
def test_git_lfs_pointers_and_web_pages_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", encoding="utf-8")
    with pytest.raises(InputError, match="Git LFS pointer") as caught:
        open_file(path)
    assert caught.value.hint == "git lfs pull"
    path.write_text("\n<!DOCTYPE html><html>not found</html>", encoding="utf-8")
    with pytest.raises(InputError, match="web page"):
        open_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".model", ""])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pytorch_file_is_known_by_its_content(tmp_path: Path, suffix: str, legacy: bool) -> None:
    assert_as_torch_loads(save(tmp_path / f"w{suffix}", TYPED, _use_new_zipfile_serialization=not legacy))


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.npy", b"")
    with pytest.raises(InputError, match=r"zip archive without a PyTorch checkpoint in it"):
        open_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.npy", b"")
    with pytest.raises(InputError, match=r"lies in no folder"):
        open_file(path)


def test_plain_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": [1.0, 2.0]}))
    with pytest.raises(InputError, match="not a whole PyTorch checkpoint"):
        open_file(tmp_path / "w.pt")
