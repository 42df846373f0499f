"""Weights from files, from the Hub and from a seed: what is read, and what is refused by name."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dexport.errors import DexportError, InputError, MachineError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.steps import peak_rss_bytes, reset_peak_rss
from dexport.exporter.variant import resolve
from dexport.exporter.weights.address import SUFFIXES, TORCH_SUFFIXES, locate
from dexport.exporter.weights.containers import CONTAINERS
from dexport.exporter.weights.loading import check_names, load_into, open_file, open_weights
from dexport.exporter.weights.source import RandomSource, is_finite
from tests.golden import load_golden

MB = 1 << 20
PINNED_FC_BIAS = [0.045676, 0.042101, -0.026359, 0.031916]


class Net(nn.Module):
    """A small network with a table that its constructor computes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("table", torch.arange(4.0, device="cpu"))


def meta_net() -> nn.Module:
    with torch.device("meta"):
        return Net()


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Net().state_dict()


def save_torch(value: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def read_all(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    source = open_file(path)
    return {name: source.read(name, dtype) for name in source.shapes}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


both_formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


# What is read


def test_safetensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    source = open_file(path)
    assert_same(read_all(path), state)
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert source.origin.kind == "safetensors"
    assert source.origin.path == str(source.origin) == str(path)
    assert source.origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.origin.size == path.stat().st_size
    assert not source.origin.random


@both_formats
@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_bare_pytorch_file(tmp_path: Path, state: dict[str, Tensor], suffix: str, legacy: bool) -> None:
    path = save_torch(state, tmp_path / f"w{suffix}", legacy=legacy)
    assert_same(read_all(path), state)
    origin = open_file(path).origin
    assert (origin.kind, origin.container) == ("torch", "")
    assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@both_formats
@pytest.mark.parametrize("key", CONTAINERS)
def test_container_of_training_code(tmp_path: Path, state: dict[str, Tensor], key: str, legacy: bool) -> None:
    training = {
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4, results_dir="x"),
        "opt": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "step": 7,
        "epoch": None,
    }
    path = save_torch({**training, key: OrderedDict(state)}, tmp_path / "w.pt", legacy=legacy)
    assert_same(read_all(path), state)
    origin = open_file(path).origin
    assert origin.container == key
    assert str(origin) == f"{path} [{key}]"


def test_averaged_weights_come_before_others(tmp_path: Path, state: dict[str, Tensor]) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    path = save_torch({"model": other, "state_dict": other, "ema": state}, tmp_path / "w.pt")
    assert_same(read_all(path), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, state: dict[str, Tensor], prefix: str, suffix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / f"w{suffix}"
    save_torch(wrapped, path) if suffix == ".pt" else save_file(wrapped, path)
    assert_same(read_all(path), state)


def test_prefix_of_some_names_only_stays(tmp_path: Path) -> None:
    path = save_torch({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pt")
    assert set(open_file(path).shapes) == {"module.a", "b"}


BASE = torch.arange(24, dtype=torch.float32)
LAYOUTS = {
    "whole": BASE,
    "transposed": BASE.view(4, 6).t(),
    "slice of shared storage": BASE[3:9],
    "strided": BASE[::5],
    "expanded": BASE[:3].expand(4, 3),
    "scalar": torch.tensor(3.5),
    "parameter": nn.Parameter(BASE + 1),
    "bfloat16": (BASE + 0.1).bfloat16(),
    "float16": (BASE + 0.1).half(),
    "float64": (BASE + 0.1).double(),
    "int64": torch.arange(-3, 4),
    "uint8": torch.arange(250, 256, dtype=torch.uint8),
    "bool": BASE > 3,
}


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_every_layout_and_dtype_is_read_right(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    got = read_all(save_torch(LAYOUTS, tmp_path / "w.pt", legacy=legacy), dtype)
    for name, tensor in LAYOUTS.items():
        assert got[name].dtype == dtype
        assert got[name].is_contiguous()
        assert torch.equal(got[name], tensor.detach().to(dtype)), name


def test_dtypes_of_safetensors_are_read_right(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in LAYOUTS.items()}
    tensors["float8"] = torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "w.safetensors")
    assert_same(read_all(tmp_path / "w.safetensors"), {name: tensor.float() for name, tensor in tensors.items()})


def test_complex_values_do_not_lose_their_imaginary_part_silently(tmp_path: Path) -> None:
    path = save_torch({"freqs": torch.ones(3, dtype=torch.complex64)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"freqs is torch\.complex64, which torch\.float32 cannot hold"):
        read_all(path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_only_the_wanted_tensor_is_in_memory(tmp_path: Path, suffix: str) -> None:
    size, count = 8 * MB, 8
    tensors = {f"t{i}": torch.full((size // 4,), float(i)) for i in range(count)}
    path = tmp_path / f"w{suffix}"
    save_torch(tensors, path) if suffix == ".pt" else save_file(tensors, path)
    del tensors
    reset_peak_rss()
    before = peak_rss_bytes()
    source = open_file(path)
    for i in range(count):
        assert source.read(f"t{i}", torch.float32)[-1] == i
    # One tensor, and the same again for a mapping or a cast; the file is eight.
    assert peak_rss_bytes() - before < 3 * size


# Seeded noise


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    names = ["fc.weight", "fc.bias", "norm.weight", "norm.bias"]
    first, again, other = (RandomSource(meta_net(), seed) for seed in (5, 5, 6))
    forward = {name: first.read(name, torch.float32) for name in names}
    backward = {name: again.read(name, torch.float32) for name in reversed(names)}
    assert_same(backward, forward)
    assert_same({"fc.weight": first.read("fc.weight", torch.float32)}, {"fc.weight": forward["fc.weight"]})
    assert not any(torch.equal(other.read(name, torch.float32), forward[name]) for name in names)
    assert not torch.equal(forward["fc.bias"], forward["norm.bias"])


def test_random_weights_are_pinned() -> None:
    values = RandomSource(meta_net(), 0).read("fc.bias", torch.float32)
    torch.testing.assert_close(values, torch.tensor(PINNED_FC_BIAS), rtol=0, atol=1e-6)


def test_random_weights_keep_variance_and_gains() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(400, 300), nn.LayerNorm(300))
    source = RandomSource(net, 0)
    assert source.read("0.weight", torch.float32).std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert source.read("1.weight", torch.float32).mean().item() == pytest.approx(1.0, abs=0.02)
    assert source.read("1.bias", torch.float32).mean().item() == pytest.approx(0.0, abs=0.02)


def test_tables_of_the_constructor_keep_their_values() -> None:
    assert torch.equal(RandomSource(meta_net(), 3).read("table", torch.float32), torch.arange(4.0))


def test_origin_of_random_weights_says_so() -> None:
    origin = open_weights(None, meta_net(), seed=4).origin
    assert origin.random
    assert (origin.kind, origin.seed, origin.sha256) == ("random", 4, "")
    assert str(origin) == "RANDOM weights (seed 4), not a trained model"


def test_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="--seed -1 is negative"):
        open_weights(None, meta_net(), seed=-1)


def test_load_into_fills_a_meta_module(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save_torch({name: tensor.double() for name, tensor in state.items()}, tmp_path / "w.pt")
    net = meta_net()
    assert_same(load_into(open_weights(path, net), net).state_dict(), state)


# Values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float, suffix: str) -> None:
    tensor = torch.zeros(10)
    tensor[3] = tensor[7] = bad
    path = tmp_path / f"w{suffix}"
    save_torch({"a.b": tensor}, path) if suffix == ".pt" else save_file({"a.b": tensor}, path)
    with pytest.raises(InputError, match=r"a\.b has 2 NaN or infinite values out of 10") as caught:
        read_all(path)
    assert "earlier checkpoint" in caught.value.hint


def test_weights_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    path = save_torch({"a": torch.tensor([1e5])}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="a has 1 NaN or infinite"):
        open_file(path).read("a", torch.float16)


@pytest.mark.parametrize(
    ("values", "finite"),
    [([], True), ([1.0, -1.0], True), ([1.0, float("nan")], False), ([float("-inf"), 0.0], False)],
)
def test_is_finite(values: list[float], finite: bool) -> None:
    assert is_finite(torch.tensor(values)) is finite


# Names and shapes


def test_differences_are_listed_by_name(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["norm.bias"]
    state["fc.weight"] = torch.zeros(4, 5)
    state["head.weight"] = torch.zeros(1)
    path = save_torch({"ema": state}, tmp_path / "w.pt")
    with pytest.raises(InputError) as caught:
        open_weights(path, meta_net())
    assert str(caught.value).splitlines() == [
        f"{path} [ema] does not fit this model",
        "  missing (1):",
        "    norm.bias",
        "  unexpected (1):",
        "    head.weight",
        "  wrong shape (1):",
        "    fc.weight: [4, 5] in the checkpoint, [4, 3] in the model",
    ]
    assert "--set" in caught.value.hint
    assert "dexport info" in caught.value.hint


def test_long_lists_of_names_are_shortened(tmp_path: Path, state: dict[str, Tensor]) -> None:
    extra = {f"extra.{i:03}": torch.zeros(1) for i in range(50)}
    with pytest.raises(InputError) as caught:
        open_weights(save_torch({**state, **extra}, tmp_path / "w.pt"), meta_net())
    text = str(caught.value)
    assert "unexpected (50):" in text
    assert "... and 30 more" in text
    assert "extra.019" in text
    assert "extra.020" not in text


def test_scalar_is_not_a_vector_of_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    net = meta_net()
    net.register_buffer("scale", torch.zeros(1, device="meta"))
    path = save_torch({**state, "scale": torch.tensor(1.0)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"scale: \[\] in the checkpoint, \[1\] in the model"):
        check_names(open_file(path), net)


# Files that are not whole


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_safetensors(tmp_path: Path, state: dict[str, Tensor], keep: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a whole safetensors file") as caught:
        open_file(path)
    assert "again" in caught.value.hint


@both_formats
def test_pytorch_file_truncated_anywhere(tmp_path: Path, legacy: bool) -> None:
    path = save_torch({"a": torch.ones(64)}, tmp_path / "w.pt", legacy=legacy)
    whole = path.read_bytes()
    for keep in range(0, len(whole), 23):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError) as caught:
            open_file(path)
        assert str(path) in str(caught.value)
        assert caught.value.hint


def test_alignment_of_zero_is_refused_before_it_ends_the_process(tmp_path: Path) -> None:
    path = save_torch({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "w.pt", legacy=False)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, b"0" if name.endswith(".storage_alignment") else content)
    with pytest.raises(InputError, match="alignment is not positive"):
        open_file(path)


@both_formats
def test_damaged_pytorch_file_is_read_or_refused(tmp_path: Path, legacy: bool) -> None:
    path = save_torch({"ema": {"a": torch.ones(4, 3), "b": torch.arange(5)}}, tmp_path / "w.pt", legacy=legacy)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_all(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert 30 < refused < 300


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes_are_refused(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    for start in (b"", b"\x80\x02", b"PK\x03\x04", b"(lp0\n"):
        for _ in range(25):
            path = tmp_path / f"w{suffix}"
            path.write_bytes(start + rng.randbytes(rng.randrange(200)))
            with pytest.raises(InputError):
                open_file(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"a": 1, "b": 2}, "holds no state dict; its keys are: a, b"),
        ({}, "holds no state dict"),
        ({1: torch.ones(1)}, "holds no state dict; its keys are: 1"),
        ({"a": torch.ones(3).to_sparse()}, "holds no state dict; its keys are: a"),
        ({"ema": {}, "model": {"a": "b"}}, "holds no state dict; its keys are: ema, model"),
    ],
)
@both_formats
def test_pytorch_file_without_state_dict(tmp_path: Path, value: Any, message: str, legacy: bool) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_file(save_torch(value, tmp_path / "w.pt", legacy=legacy))
    assert caught.value.hint


# Pickles that run code


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@both_formats
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    witness = tmp_path / "ran"
    path = save_torch({"a": torch.ones(2), "x": Malicious(witness)}, tmp_path / "w.pt", legacy=legacy)
    with pytest.raises(InputError, match=r"needs to run \w+\.system when it is unpickled; that was refused") as caught:
        open_file(path)
    assert not witness.exists()
    assert "safetensors.torch.save_file" in caught.value.hint
    # The file does run code where it is allowed to.
    torch.load(path, weights_only=False)
    assert witness.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_plain_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "ran"
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps(Malicious(witness), protocol=protocol))
    with pytest.raises(InputError, match="refused") as caught:
        open_file(path)
    assert not witness.exists()
    assert "safetensors.torch.save_file" in caught.value.hint
    assert "weights_only=False" not in str(caught.value)


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    path = save_torch(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"needs to run torch\.nn\.modules\.linear\.Linear"):
        open_file(path)


# Addresses


def test_file_and_folder_are_located(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.touch()
    (tmp_path / "README.md").touch()
    assert locate(str(path)) == path
    assert locate(str(tmp_path)) == path


def test_folder_without_or_with_several_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds 0 checkpoint files:\s+none") as caught:
        locate(str(tmp_path))
    for name in ("a.pt", "b.safetensors", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"holds 2 checkpoint files:\s+a\.pt\s+b\.safetensors$") as caught:
        locate(str(tmp_path))
    assert caught.value.hint == "name one file"


@pytest.mark.parametrize("address", ["absent.pt", "a/b/absent", "o/n.pt", "hf://o", "hf://o/n/", "https://x/y"])
def test_absent_file(address: str) -> None:
    with pytest.raises(UsageError, match=f"checkpoint {address} does not exist") as caught:
        locate(address)
    assert "hf://owner/name/file" in caught.value.hint


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").touch()
    with pytest.raises(UsageError, match="unknown kind of checkpoint") as caught:
        open_weights(tmp_path / "w.onnx", meta_net())
    assert ".safetensors" in caught.value.hint


# The Hub

COMMIT = "c" * 40
REVISIONS = f"main|v1|refs%2Fpr%2F1|feature%2Fx|{COMMIT}"


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the Hub does for one repository: its tree, and files that are redirected to a store."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.requests: list[str] = []
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def facts(data: bytes) -> dict[str, str]:
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    return {"X-Repo-Commit": COMMIT, "X-Linked-ETag": etag, "X-Linked-Size": str(len(data))}


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        tree = re.fullmatch(rf"/api/models/owner/name/tree/({REVISIONS})", path)
        resolved = re.fullmatch(rf"/owner/name/resolve/(?:{REVISIONS})/(.+)", path)
        if self.server.broken:
            self.answer(503, b"")
        elif tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in self.server.files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif resolved and resolved[1] in self.server.files:
            data = self.server.files[resolved[1]]
            self.answer(302, b"", {"Location": f"{self.server.url}/store/{resolved[1]}", **facts(data)})
        elif path.startswith("/store/"):
            data = self.server.files[path.removeprefix("/store/")]
            self.answer(200, data, facts(data))
        elif resolved:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif path.startswith(("/api/models/owner/name/", "/owner/name/")):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def point_to(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """huggingface_hub reads its environment when it is imported; here it has been."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # It waits between its attempts.
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def hub(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    save_file(state, tmp_path / "w.safetensors")
    server = Hub({"README.md": b"# name", "w.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_to(monkeypatch, server.url, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner/name/w.safetensors",
        "hf://owner/name@v1/w.safetensors",
        "hf://owner/name",
        "hf://owner/name@v1",
        "owner/name",
    ],
)
def test_checkpoint_comes_from_the_hub(hub: Hub, state: dict[str, Tensor], address: str) -> None:
    source = open_weights(address, meta_net())
    assert_same({name: source.read(name, torch.float32) for name in source.shapes}, state)
    revision = "v1" if "@v1" in address else "main"
    assert f"HEAD /owner/name/resolve/{revision}/w.safetensors" in hub.requests
    assert "GET /store/w.safetensors" in hub.requests


def test_second_build_does_not_download_again(hub: Hub) -> None:
    first = locate("hf://owner/name/w.safetensors")
    hub.requests.clear()
    assert locate("hf://owner/name/w.safetensors") == first
    assert not any(request.startswith("GET /store/") for request in hub.requests)


@pytest.mark.parametrize(
    "address", ["hf://owner/name/absent.pt", "hf://owner/name@v9/w.safetensors", "hf://owner/name@v9", "owner/absent"]
)
@pytest.mark.usefixtures("hub")
def test_wrong_address_on_the_hub(address: str) -> None:
    with pytest.raises(InputError, match="404") as caught:
        locate(address)
    assert caught.value.hint == "check the name, the revision and your access"


def test_hub_repository_with_several_checkpoints(hub: Hub) -> None:
    hub.files["other.pt"] = b""
    with pytest.raises(UsageError, match=r"hf://owner/name holds 2 checkpoint files:\s+w\.safetensors\s+other\.pt"):
        locate("owner/name")


@pytest.mark.parametrize("address", ["hf://a--b/name/w.pt", "hf://a..b/name"])
def test_malformed_hub_address(address: str) -> None:
    with pytest.raises(UsageError, match="repo_id"):
        locate(address)


@pytest.mark.parametrize("address", ["hf://owner/name/w.safetensors", "owner/name"])
def test_hub_out_of_order_is_an_error_of_the_environment(hub: Hub, address: str) -> None:
    hub.broken = True
    with pytest.raises(MachineError, match="cannot be reached") as caught:
        locate(address)
    assert "download the file elsewhere" in caught.value.hint


@pytest.mark.parametrize("address", ["hf://owner/name/w.safetensors", "owner/name"])
def test_unreachable_hub_is_an_error_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    server = Hub({})
    server.server_close()
    point_to(monkeypatch, server.url, tmp_path / "cache")
    with pytest.raises(MachineError, match="cannot be reached") as caught:
        locate(address)
    assert caught.value.exit_code == 3


def test_offline_mode_is_an_error_of_the_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for address in ("hf://owner/name/w.safetensors", "owner/name"):
        with pytest.raises(MachineError, match="cannot be reached"):
            locate(address)
    assert not hub.requests


@pytest.mark.parametrize(
    ("address", "revision"),
    [
        ("hf://owner/name@refs/pr/1/w.safetensors", "refs%2Fpr%2F1"),
        ("hf://owner/name@refs/pr/1", "refs%2Fpr%2F1"),
        ("hf://owner/name@refs%2Fpr%2F1/w.safetensors", "refs%2Fpr%2F1"),
        ("hf://owner/name@feature%2Fx/w.safetensors", "feature%2Fx"),
        ("hf://owner/name@feature%2Fx", "feature%2Fx"),
    ],
)
def test_revisions_with_slashes(hub: Hub, address: str, revision: str) -> None:
    assert locate(address).read_bytes() == hub.files["w.safetensors"]
    assert f"HEAD /owner/name/resolve/{revision}/w.safetensors" in hub.requests


@pytest.mark.parametrize(
    "address",
    [
        "owner/name",
        "hf://owner/name",
        "hf://owner/name/w.safetensors",
        "hf://owner/name@v1",
        "hf://owner/name@refs/pr/1/w.safetensors",
        f"hf://owner/name@{COMMIT}/w.safetensors",
    ],
)
def test_cached_files_are_found_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    from huggingface_hub import constants

    found = locate(address)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(address) == found
    assert not hub.requests


def test_sharded_weights_come_from_the_hub(hub: Hub, tmp_path: Path, state: dict[str, Tensor]) -> None:
    del hub.files["w.safetensors"]
    mapping = {}
    for number, (name, tensor) in enumerate(state.items(), start=1):
        shard = mapping[name] = f"model-{number:05d}-of-{len(state):05d}.safetensors"
        save_file({name: tensor}, tmp_path / shard)
        hub.files[shard] = (tmp_path / shard).read_bytes()
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": mapping}).encode()
    for address in ("owner/name", "hf://owner/name@v1/model.safetensors.index.json"):
        source = open_weights(address, meta_net())
        assert_same({name: source.read(name, torch.float32) for name in source.shapes}, state)


def test_hub_endpoint_of_the_environment_is_used(hub: Hub, tmp_path: Path) -> None:
    code = "import sys; from dexport.exporter.weights.address import locate; print(locate(sys.argv[1]))"
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", code, "owner/name"], env=environment, capture_output=True, text=True, check=True
    )
    found = Path(done.stdout.strip())
    assert found.is_relative_to(home)
    assert found.read_bytes() == hub.files["w.safetensors"]


def test_every_refusal_is_a_dexport_error() -> None:
    assert issubclass(InputError, DexportError)
    assert (UsageError.exit_code, MachineError.exit_code, InputError.exit_code) == (2, 3, 4)


def test_an_index_table_that_the_graph_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    golden = load_golden("diffit-latent")
    meta_module = resolve(find_recipe("diffit-256"), golden.config).meta_module()
    path = tmp_path / "diffit.safetensors"
    save_file(golden.weights, path)
    open_weights(path, meta_module)
    name = "blocks.1.attn.relative_position_index"
    save_file({**golden.weights, name: golden.weights[name].T.contiguous()}, path)
    with pytest.raises(InputError, match="not the index that this network computes") as caught:
        open_weights(path, meta_module)
    assert name in str(caught.value)
