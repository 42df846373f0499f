"""Files behind weights: several joined by an index, TorchScript that is not run, and files that change while read."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dexport
from dexport import hashing
from dexport.errors import InputError, UsageError
from dexport.exporter import network_build
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.address import locate
from dexport.exporter.weights.loading import load_into, open_file, open_weights
from dexport.exporter.weights.source import RandomSource
from dexport.hashing import hash_ahead, sha256_of
from dexport.validate.features.weights import open_weights_file

SMALL = {"hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 3, "input_size": 4}


def weights(seed: int, name: str = "dit-s-2") -> dict[str, Tensor]:
    source = RandomSource(resolve(find_recipe(name), SMALL).outline, seed)
    return {key: source.read(key, torch.float32) for key in source.shapes}


def assert_same(got: Any, expected: dict[str, Tensor]) -> None:
    assert set(got.shapes) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got._read(name), tensor), name


# Several files


def write_shards(folder: Path, tensors: dict[str, Tensor], kind: str) -> Path:
    names = sorted(tensors)
    suffix, save = (".safetensors", save_file) if kind == "model" else (".bin", torch.save)
    mapping = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{kind}-{number:05d}-of-00002{suffix}"
        save({name: tensors[name] for name in part}, folder / shard)
        mapping |= dict.fromkeys(part, shard)
    index = folder / f"{kind}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}), encoding="utf-8")
    return index


kinds = pytest.mark.parametrize("kind", ["model", "pytorch_model"])


@kinds
@pytest.mark.parametrize("given", ["index", "folder"])
def test_an_index_joins_its_files(tmp_path: Path, kind: str, given: str) -> None:
    tensors = weights(1)
    index = write_shards(tmp_path, tensors, kind)
    source = open_weights(index if given == "index" else tmp_path, resolve(find_recipe("dit-s-2"), SMALL).outline)
    assert_same(source, tensors)
    assert (source.origin.path, source.origin.size) == (
        str(index),
        sum(path.stat().st_size for path in tmp_path.iterdir()),
    )
    before = source.origin.sha256
    write_shards(tmp_path, {**tensors, "y_embedder.embedding_table.weight": torch.zeros(4, 24)}, kind)
    assert open_file(index).origin.sha256 != before


@kinds
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("00001-of", "00009-of"),
        lambda text: text.replace('"weight_map"', '"weights"'),
        lambda _: json.dumps({"weight_map": {"a": "../w.safetensors"}}),
        lambda _: json.dumps({"weight_map": {"a": "/etc/passwd"}}),
        lambda _: json.dumps({"weight_map": {"a": "."}}),
        lambda _: json.dumps({"weight_map": {"a": 3}}),
        lambda _: json.dumps({"weight_map": []}),
        lambda text: text.replace("blocks.0", "blocks.9"),
        lambda text: text[:-5],
        lambda _: "[" * 100_000,
        lambda _: "version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["missing", "no map", "outside", "absolute", "dot", "number", "list", "names", "cut", "deep", "pointer"],
)
def test_a_bad_index_is_refused(tmp_path: Path, kind: str, damage: Callable[[str], str]) -> None:
    index = write_shards(tmp_path, weights(1), kind)
    index.write_text(damage(index.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_file(index)
    assert str(index) in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        {"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"a": [1]},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"a": 1}},
        [],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        open_file(path)


# TorchScript


class Inner(nn.Module):
    """Buffers, an attribute that is no weight, and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.again = self.fc
        self.register_buffer("mean", torch.randn(3))
        self.note = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.fc(x)) + self.mean + self.note.sum()


class Outer(nn.Module):
    """Lists of modules, of one class and of several."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Inner(), Inner()])
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.share = nn.Parameter(torch.ones(2, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.inner:
            x = module(x)
        return self.conv(x[:, :, None, None]) * self.share.sum()


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("traced", [False, True], ids=["scripted", "traced"])
def test_the_weights_of_torchscript(tmp_path: Path, traced: bool) -> None:
    torch.manual_seed(0)
    module = Outer().eval()
    script = torch.jit.trace(module, torch.ones(2, 3)) if traced else torch.jit.script(module)
    script.save(str(tmp_path / "w.pt"))
    source = open_file(tmp_path / "w.pt")
    assert source.origin.kind == "torchscript"
    assert_same(source, torch.jit.load(tmp_path / "w.pt").state_dict())


class Evil(nn.Module):
    """Its state is set by code of its own, which here would never end."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.fc.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        n = 0
        while n >= 0:
            n = 0
        self.training = state[1]


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", [open_file, lambda path: open_weights_file(path, lambda name: name)])
def test_the_code_of_torchscript_is_not_run(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    torch.jit.script(Evil()).save(str(tmp_path / "evil.pt"))
    with pytest.raises(InputError, match=r"evil\.pt"):
        reader(tmp_path / "evil.pt")


def repacked(path: Path, edit: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in edit(members).items():
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    "index",
    [
        b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub.",
        b"\x80\x02K\x01.",
        b"\x80\x02c__torch__.absent\nA\n)\x81}b.",
    ],
    ids=["call", "cycle", "number", "no script"],
)
def test_hostile_torchscript_is_refused(tmp_path: Path, index: bytes) -> None:
    path = tmp_path / "w.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    repacked(path, lambda m: {name: index if name.endswith("data.pkl") else data for name, data in m.items()})
    with pytest.raises(InputError, match=r"w\.pt"):
        open_file(path)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_script_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if "/code/" in name and name.endswith(".py"):
                archive.writestr(name, b" " * (20 << 20), zipfile.ZIP_DEFLATED)
            else:
                archive.writestr(name, content)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match="is too long"):
        open_file(path)


# Files that change while they are read


def exchange(path: Path, other: Path) -> None:
    other.replace(path)


def overwrite(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def overwrite_and_hide(path: Path, other: Path) -> None:
    """The size is the same, and the time is set back."""
    facts = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def remove(path: Path, _: Path) -> None:
    path.unlink()


def cut(path: Path, _: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


CHANGES = pytest.mark.parametrize("change", [exchange, overwrite, overwrite_and_hide, remove, cut])


@CHANGES
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_changed_file_is_noticed(tmp_path: Path, change: Callable[[Path, Path], None], suffix: str) -> None:
    save = save_file if suffix == ".safetensors" else torch.save
    path, other = tmp_path / f"w{suffix}", tmp_path / f"other{suffix}"
    save(weights(1), path)
    save(weights(2), other)
    module = resolve(find_recipe("dit-s-2"), SMALL).meta_module()
    source = open_weights(path, module)
    source.check_unchanged()
    change(path, other)
    with pytest.raises(InputError):
        load_into(source, module)
    with pytest.raises(InputError, match="was changed, exchanged or removed"):
        source.check_unchanged()


def test_an_exchanged_file_is_read_as_it_was_hashed(tmp_path: Path) -> None:
    tensors = weights(1)
    torch.save(tensors, tmp_path / "w.pt")
    torch.save(weights(2), tmp_path / "other.pt")
    expected = sha256_of(tmp_path / "w.pt")
    source = open_file(tmp_path / "w.pt")
    exchange(tmp_path / "w.pt", tmp_path / "other.pt")
    assert source.origin.sha256 == expected
    assert_same(source, tensors)


@pytest.mark.parametrize("change", [exchange, overwrite])
@pytest.mark.parametrize("option", ["checkpoint", "init_from"])
def test_a_build_stops_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, Path], None], option: str
) -> None:
    """Neither a bundle nor an entry of the cache says the old hash of the new weights."""
    monkeypatch.setenv("DEXPORT_CACHE", str(tmp_path / "cache"))
    path, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    save_file(weights(1), path)
    save_file(weights(2), other)
    export = network_build.export_onnx

    def export_late(*args: Any, **options: Any) -> Any:
        change(path, other)
        return export(*args, **options)

    monkeypatch.setattr(network_build, "export_onnx", export_late)
    recipe = "dit-s-2" if option == "checkpoint" else "lit-s-2"
    with pytest.raises(InputError, match="was changed, exchanged or removed"):
        dexport.build(recipe, tmp_path / "out", settings=SMALL, **{option: str(path)})
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").glob("*/entry.json"))


def test_a_hash_begun_on_another_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_begun", {})
    path, other = tmp_path / "w.pt", tmp_path / "other.pt"
    torch.save({"a": torch.ones(1000)}, path)
    torch.save({"a": torch.zeros(1000)}, other)
    expected = sha256_of(other)
    hash_ahead(path)
    exchange(path, other)
    assert open_file(path).origin.sha256 == expected


def test_a_checkpoint_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_begun", {})
    calls: list[int] = []
    digest = hashing._sha256
    monkeypatch.setattr(hashing, "_sha256", lambda *args: calls.append(1) or digest(*args))
    torch.save({"model": weights(1), "ema": weights(2)}, tmp_path / "w.pt")
    hash_ahead(tmp_path / "w.pt")
    open_weights(tmp_path / "w.pt", resolve(find_recipe("dit-s-2"), SMALL).outline)
    assert len(calls) == 1


# Addresses


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("dexport.exporter.weights.address._download", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("address", ["", " ", "::ema"])
def test_an_empty_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1)}, "w.pt")
    with pytest.raises(UsageError, match="is empty"):
        locate(address)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "address",
    ["./x", "../x", "./runs/x", "/x/y", "~/x-absent", "runs/last", "runs/last.pt", "a/b.npz", "a/b.onnx", ".hidden/x"],
)
def test_what_looks_like_a_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="does not exist"):
        locate(address)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("address", ["a\0b", "x" * 5000, "~nobody-of-this-name/x"])
def test_impossible_paths_are_refused(address: str) -> None:
    with pytest.raises(UsageError):
        locate(address)


@pytest.mark.usefixtures("offline")
def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(UsageError, match="no regular file"):
        locate(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="not a regular file"):
        open_file(tmp_path / "w.pt")


@pytest.mark.usefixtures("offline")
def test_local_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "runs" / "w.pt")
    for address in ("~/runs/w.pt", "./runs/w.pt", "runs/w.pt", "runs", "./runs/", "~/runs", str(tmp_path / "runs")):
        assert locate(address).samefile(tmp_path / "runs" / "w.pt"), address
    shutil.copy(tmp_path / "runs" / "w.pt", tmp_path / "owner")
    assert locate("owner").samefile(tmp_path / "owner")
