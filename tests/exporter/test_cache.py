"""The build cache: unchanged steps are copied, everything else runs, and nothing half-written or damaged is used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dexport
from dexport.bundle import load_bundle
from dexport.drafts import ALIVE, LiveFolder
from dexport.errors import MachineError, UsageError
from dexport.exporter.cache import ENTRY, Cache, LockedError, _digest, existing_cache, key_of, open_cache
from dexport.exporter.recipes import find_recipe
from dexport.exporter.reuse import is_built_in
from dexport.exporter.variant import resolve
from dexport.files import PARTIAL
from tests.cli.test_command_line import invoke

TINY = {"hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 5, "input_size": 4}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "a").write_bytes(b"a" * 1000)
    (tmp_path / "work" / "sub" / "b").write_bytes(b"b" * 500)
    return tmp_path / "work"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10_000)


def store(cache: Cache, key: str, work: Path) -> None:
    cache.keep(key, "label", work, ["a", "sub/b"], {"answer": 42})


def test_what_was_kept_comes_back_as_a_copy(cache: Cache, work: Path, tmp_path: Path) -> None:
    assert cache.take("k", tmp_path) is None
    store(cache, "k", work)
    assert cache.take("k", tmp_path / "out") == {"answer": 42}
    assert (tmp_path / "out/a").read_bytes() == b"a" * 1000
    assert (tmp_path / "out/sub/b").read_bytes() == b"b" * 500
    assert {(tmp_path / "out/a").stat().st_nlink, (work / "a").stat().st_nlink} == {1}
    assert [(kept.key, kept.label, kept.size) for kept in cache.entries()] == [("k", "label", 1500)]


@pytest.mark.parametrize("name", ["a", "sub/b", ENTRY])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_entry_is_removed_and_leaves_nothing(
    cache: Cache, work: Path, tmp_path: Path, name: str, damage: str
) -> None:
    store(cache, "k", work)
    file = cache.folder / "k" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "delete":
        file.unlink()
    out = tmp_path / "out"
    assert cache.take("k", out) is None
    assert [path for path in out.rglob("*") if path.is_file()] == []
    store(cache, "k", work)
    assert cache.take("k", out) == {"answer": 42}


def test_a_full_disk_costs_no_entry(
    cache: Cache, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store(cache, "k", work)
    out = tmp_path / "out"
    opened = Path.open

    def on_a_full_disk(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        file = opened(path, mode, *args, **named)
        if path == out / "sub" / "b":
            file.close()
            return opened(Path("/dev/full"), mode, *args, **named)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", on_a_full_disk)
        assert cache.take("k", out) is None
    assert "was not used: [Errno 28] No space left on device" in caplog.text
    assert [path for path in out.rglob("*") if path.is_file()] == []
    assert cache.take("k", out) == {"answer": 42}


def test_the_least_recently_used_makes_place(cache: Cache, work: Path, tmp_path: Path) -> None:
    for index, key in enumerate("abcdef"):
        store(cache, key, work)
        os.utime(cache.folder / key / ENTRY, (index, index))
    assert cache.take("a", tmp_path / "out") is not None
    store(cache, "g", work)
    assert {kept.key for kept in cache.entries()} == {"a", "c", "d", "e", "f", "g"}
    assert sum(kept.size for kept in cache.entries()) <= cache.limit
    Cache(cache.folder, 100).keep("big", "label", work, ["a"], None)
    assert "big" not in {kept.key for kept in cache.entries()}
    assert len(cache.prune()) == 6
    assert cache.entries() == []


def hammer(folder: Path, work: Path, out: Path, failures: Any) -> None:
    cache = Cache(folder, 100_000)
    for turn in range(30):
        store(cache, "shared", work)
        if cache.take("shared", out) is not None and (out / "a").read_bytes() != b"a" * 1000:
            failures.value += 1
        if turn % 10 == 9:
            cache.prune()


def test_builds_at_the_same_time_do_not_disturb_each_other(cache: Cache, work: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Value("i", 0)
    builds = [
        context.Process(target=hammer, args=(cache.folder, work, tmp_path / f"out{n}", failures)) for n in range(3)
    ]
    for build in builds:
        build.start()
    for build in builds:
        build.join(60)
    assert [build.exitcode for build in builds] == [0, 0, 0]
    assert failures.value == 0


def keep_large(folder: Path, work: Path) -> None:
    Cache(folder, 10**9).keep("large", "label", work, ["large"], None)


def test_a_killed_build_leaves_no_entry_and_its_remains_are_removed(cache: Cache, work: Path) -> None:
    with (work / "large").open("wb") as file:
        file.truncate(400_000_000)
    build = multiprocessing.get_context("fork").Process(target=keep_large, args=(cache.folder, work))
    build.start()
    deadline = time.monotonic() + 30
    while not list(cache.folder.glob(f".*{PARTIAL}*/large")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(build.pid or 0, signal.SIGKILL)
    build.join(30)
    assert list(cache.folder.glob(f".*{PARTIAL}*"))
    assert cache.entries() == []
    store(cache, "k", work)
    assert list(cache.folder.glob(f".*{PARTIAL}*")) == []


@pytest.mark.parametrize("stop", [True, False])
def test_a_lock_that_a_process_does_not_let_go_of(
    cache: Cache, work: Path, tmp_path: Path, stop: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of one that was stopped: it is waited for once, with a bound, then there is no cache."""
    store(cache, "k", work)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dexport.exporter.cache import Cache\n"
        "with Cache(Path(sys.argv[1]), 1)._locked(shared=False):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(cache.folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        if stop:
            holder.send_signal(signal.SIGSTOP)
        waiting = Cache(cache.folder, cache.limit, wait=1.2)
        started = time.monotonic()
        assert waiting.take("k", tmp_path / "out") is None
        assert time.monotonic() - started < 10
        assert "waiting up to 1.2 s (DEXPORT_CACHE_WAIT)" in caplog.text
        assert "going on without the cache" in caplog.text
        waiting.wait = 1e9  # it does not wait again
        assert waiting.take("k", tmp_path / "out") is None
        store(waiting, "l", work)
        with pytest.raises(LockedError):
            waiting.prune()
        holder.kill()
        holder.wait()
    assert cache.take("k", tmp_path / "out") == {"answer": 42}


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path) -> None:
    (path.parent / "victim").write_bytes(b"a" * 1000)
    path.symlink_to(path.parent / "victim")


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [a_pipe, a_link, a_device, a_folder])
@pytest.mark.parametrize("name", ["a", "sub/b", ENTRY])
def test_an_entry_is_made_of_files(
    cache: Cache, work: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    store(cache, "k", work)
    (cache.folder / "k" / name).unlink()
    make(cache.folder / "k" / name)
    assert cache.take("k", tmp_path / "out") is None
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert not (cache.folder / "k").exists()
    store(cache, "k", work)
    assert cache.take("k", tmp_path / "out") == {"answer": 42}


@pytest.mark.parametrize("make", [a_pipe, a_link, a_device, a_folder])
def test_a_lock_that_is_no_file(cache: Cache, work: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    store(cache, "k", work)
    (cache.folder / ".lock").unlink(missing_ok=True)
    make(cache.folder / ".lock")
    assert cache.take("k", tmp_path / "out") is None
    cache.prune()
    store(cache, "l", work)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "deep/link/x"])
def test_names_do_not_lead_out_of_an_entry(cache: Cache, work: Path, tmp_path: Path, name: str) -> None:
    store(cache, "k", work)
    (cache.folder / "outside").write_bytes(b"x")
    (cache.folder / "k" / "deep").mkdir()
    (cache.folder / "k" / "deep" / "link").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"x")
    file = cache.folder / "k" / ENTRY
    document = json.loads(file.read_text())
    document["files"] = {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    document["sha256"] = _digest(document)
    file.write_text(json.dumps(document))
    before = sorted(path for path in tmp_path.iterdir() if path.name != "cache")
    assert cache.take("k", tmp_path / "out" / "deep") is None
    assert sorted(path for path in tmp_path.iterdir() if path.name not in ("cache", "out")) == before


def test_drafts_of_live_builds_stay_whatever_their_numbers(cache: Cache, work: Path) -> None:
    store(cache, "k", work)
    live = LiveFolder(cache.folder / "other")
    dead = cache.folder / ".dead.partial-0123abcd"
    dead.mkdir()
    (dead / ALIVE).touch()
    store(cache, "l", work)
    cache.prune()
    assert live.path.is_dir() and not dead.exists()
    live.discard()


def test_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose user has no entry in the list of users."""

    def nobody(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "DEXPORT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert open_cache() is None
    with pytest.raises(MachineError, match="there is no home folder") as caught:
        existing_cache()
    assert "DEXPORT_CACHE=DIR" in caught.value.hint
    monkeypatch.setenv("DEXPORT_CACHE", str(tmp_path))
    assert existing_cache().folder == tmp_path


@pytest.mark.parametrize("variable", ["DEXPORT_CACHE_GB", "DEXPORT_CACHE_WAIT"])
@pytest.mark.parametrize("text", ["plenty", "nan", "inf", "-1", "1e999"])
def test_numbers_that_are_none(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"{variable}={text} is not a number"):
        open_cache()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert open_cache() is None
    with pytest.raises(MachineError, match="DEXPORT_CACHE"):
        existing_cache()
    monkeypatch.delenv("DEXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert existing_cache().folder == tmp_path / "dexport"
    monkeypatch.setenv("DEXPORT_CACHE", str(tmp_path / "here"))
    assert existing_cache().folder == tmp_path / "here"
    monkeypatch.setenv("DEXPORT_CACHE_GB", "plenty")
    with pytest.raises(UsageError, match="plenty"):
        open_cache()


def test_a_key_depends_on_every_fact() -> None:
    facts = {"recipe": "dit", "options": {"precision": "fp16", "islands": ["a"]}}
    assert key_of(facts) == key_of(json.loads(json.dumps(facts)))
    assert key_of(facts) != key_of({**facts, "options": {"precision": "fp16", "islands": ["b"]}})


def test_recipes_of_the_users_own_are_always_built() -> None:
    assert is_built_in(resolve(find_recipe("dit-s-2")))
    assert not is_built_in(resolve(find_recipe("examples/my_backbone.py")))


def test_a_second_build_takes_everything_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEXPORT_CACHE", str(tmp_path / "cache"))

    def build(name: str, **options: Any) -> Any:
        return dexport.build("dit-s-2", tmp_path / name, settings=TINY, profile="ci", **options)

    first, second = build("first"), build("second")
    one, two = (dict(result.bundle.network.manifest) for result in (first, second))
    assert {step["name"] for step in one["steps"] if step["cached"]} == set()
    assert {step["name"] for step in two["steps"] if step["cached"]} == {"onnx", "parity"}
    assert {"trace", "parity"} & {step["name"] for step in two["steps"] if not step["cached"]} == set()
    assert second.verdict is not None
    assert second.verdict.passed
    assert second.verdict.summary() == first.verdict.summary()
    for manifest in (one, two):
        manifest["sizes"].pop("peak_rss")
        manifest.pop("steps")
    assert one == two
    one, two = ({**result.bundle.manifest, "networks": None} for result in (first, second))
    assert one == two
    dexport.load(tmp_path / "second")
    for name, options in {"other": {"seed": 1}, "fresh": {"cache": False}}.items():
        steps = build(name, parity=False, **options).bundle.network.manifest["steps"]
        assert not any(step["cached"] for step in steps), name


@pytest.mark.rtx
def test_a_second_build_takes_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("DEXPORT_CACHE", str(tmp_path / "cache"))

    def build(name: str, target: str = "sm89") -> Any:
        engine = {"trt": True, "engine": "tensorrt-rtx", "targets": (target,)}
        return dexport.build("dit-s-2", tmp_path / name, settings=TINY, profile="ci", parity=False, **engine).bundle

    def cached(bundle: Any) -> set[str]:
        return {step["name"] for step in bundle.network.manifest["steps"] if step["cached"]}

    first, second, other = build("first"), build("second"), build("other", "sm120")
    assert (cached(first), cached(second), cached(other)) == (set(), {"onnx", "engine"}, {"onnx"})
    assert first.network.entry()["engine"] == second.network.entry()["engine"]
    for file in (first.network.entry()["engine"]["file"], "reports/engine.log"):
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes() != b""
    assert load_bundle(second.path).network.entry()["engine"]["targets"] == ["sm89"]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setenv("DEXPORT_CACHE", str(tmp_path / "cache"))
    assert json.loads(invoke("cache", "ls", "--json").stdout)["entries"] == []
    store(existing_cache(), "k" * 64, work)
    assert "label" in invoke("cache", "ls").stdout
    (listed,) = json.loads(invoke("cache", "ls", "--json").stdout)["entries"]
    assert (listed["key"], listed["size"]) == ("k" * 64, 1500)
    assert invoke("cache", "prune", "--keep-gb", "1").stdout.startswith("removed 0")
    assert invoke("cache", "prune").stdout.startswith("removed 1")
    assert json.loads(invoke("cache", "ls", "--json").stdout)["entries"] == []
