"""Whatever a manifest says: a program opens and plans quickly, or the manifest is refused by the field."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dexport.bundle import MANIFEST, Bundle, load_bundle
from dexport.cli import main
from dexport.errors import InputError
from dexport.runtime.engine_checks import read_facts
from dexport.runtime.opened import OpenProgram
from dexport.validate.levels.trajectory import captions

SECONDS = 5
SECTIONS = ("program", "networks", "name")
NOT_READ = ("weights", "config", "precision", "steps", "sizes", "nodes", "ops", "parity", "recipe")
"""Of a network: what is run does not depend on it."""
ABSURD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 7, 10**5, 10**9, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e300, -1e300, 1e-300,
        float("nan"), float("inf"), float("-inf"), "", "B", "edm", "flow", "ddim", "dpm-solver", "none", "y", "x", "t",
        "sigma", "log_snr", "out", "cfg_scale", "word", "9" * 5000, "\x1b]0;a\x07", "sd-vae-decoder", "pixel-shuffle-0",
        "pixel-shuffle-99999999999", "pixel-shuffle-2-tiles-999999999", "pixel-shuffle-x", "pixel-shuffle-1",
        "class", "image", "network", "model", "guided", "state", "time", "label", "prediction", [], {},
        [[]], [None], ["B", 4, 10**5, 10**5],
        ["B", 10**9, 1, 1], ["B", 4, 16, 16], [8, 4, 16, 16], ["B"] * 4, ["B"] * 1000, [1] * 1000,
        {"channels": 10**9}, {"power": -1}, {"kind": "pixel-shuffle", "factor": 10**9}, {"share": 2},
        {"clean": 0, "noisy": 0}, [float("nan"), 1], ["a"] * 10, [{"share": 0.5}] * 2,
    ]
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def paths_of(manifest: dict[str, Any]) -> list[tuple[Any, ...]]:
    found = (path for path in places(manifest) if path and path[0] in SECTIONS)
    return [path for path in found if not set(path) & set(NOT_READ)]


def mutated(manifest: dict[str, Any], changes: list[tuple[tuple[Any, ...], Any]]) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    for path, value in changes:
        place: Any = changed
        try:
            for key in path[:-1]:
                place = place[key]
            if value is DELETED:
                del place[path[-1]]
            else:
                place[path[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):  # an earlier change took that place away
            continue
    return changed


DELETED = object()


def plan(bundle: Bundle) -> None:
    """All that a command does before the first evaluation."""
    started = time.perf_counter()
    try:
        program = OpenProgram(bundle)
        program.rehearse()
        assert program.largest_batch() is None
        assert program.makes
        captions(program, [0])
        for network in bundle.networks.values():
            assert network.graphs
    except InputError as error:
        assert error.hint
    assert time.perf_counter() - started < SECONDS


@pytest.fixture(scope="module", params=["plain", "fused", "stitched"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return load_bundle(request.getfixturevalue(request.param))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_manifest_with_absurd_values(bundle: Bundle, data: st.DataObject) -> None:
    places = st.sampled_from(paths_of(dict(bundle.manifest)))
    changes = data.draw(st.lists(st.tuples(places, ABSURD | st.just(DELETED)), min_size=1, max_size=3))
    plan(Bundle(bundle.path, mutated(dict(bundle.manifest), changes)))


def test_every_fact_with_every_value(bundle: Bundle) -> None:
    """One change at a time: what several hide, one shows."""
    manifest = dict(bundle.manifest)
    paths = [path for path in paths_of(manifest) if path[0] == "program" or "batch" in path]
    for path in paths:
        for value in (DELETED, None, 10**9, -1, 0, 10**30, float("nan"), 1e300, "word", "9" * 5000, [], {}, True):
            plan(Bundle(bundle.path, mutated(manifest, [(path, value)])))


DENOISER = ("networks", "denoiser")
GRAPH = (*DENOISER, "graphs", "model")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("program", "kind"), "magic", "no program of the kind magic"),
        (("program", "kind"), DELETED, "program.kind is missing"),
        (("program", "steps"), "50", "$.steps"),
        (("program", "steps"), True, "$.steps"),
        (("program", "steps"), 10**9, "$.steps"),
        (("program", "steps"), 0, "$.steps"),
        (("program", "steps"), 1001, "1001 steps were asked for"),
        (("program", "schedule"), DELETED, "schedule"),
        (("program", "sampler"), "euler", "no sampler 'euler'"),
        (("program", "condition", "classes"), 10**9, "$.condition.classes"),
        (("program", "condition", "classes"), 0, "$.condition.classes"),
        (("program", "condition", "null"), 2**63, "$.condition.null"),
        (("program", "condition", "null"), 3, "null label 3"),
        (("program", "condition", "names"), ["one"], "1 names for 10 classes"),
        (("program", "decoding", "scale"), float("nan"), "$.decoding.scale"),
        (("program", "decoding", "scale"), 10**400, "$.decoding.scale"),
        (("program", "decoding", "factor"), 3, "pixel shuffle of 3"),
        (("program", "decoding", "tiles"), 5, "5x5 equal tiles"),
        (("program", "cfg_scale"), float("inf"), "$.cfg_scale"),
        (("program", "cfg_scale"), 1e9, "$.cfg_scale"),
        (("program", "guidance", "power"), "abc", "$.guidance.power"),
        (("program", "guidance", "channels"), -1, "$.guidance.channels"),
        ((*DENOISER, "batch", "max"), 10**9, "networks.denoiser.batch"),
        ((*DENOISER, "batch"), DELETED, "networks.denoiser.batch"),
        ((*GRAPH, "inputs"), [], "networks.denoiser.graphs"),
        ((*GRAPH, "inputs", 0, "shape"), ["B", 4], "x is float32 ['B', 4]"),
        ((*GRAPH, "inputs", 0, "shape"), ["B", 4, 10**5, 10**5], "16,777,216 cells are the most"),
        ((*GRAPH, "inputs", 0, "shape"), ["B", 60_000, 4000, 4000], "cells are the most"),
        ((*GRAPH, "inputs", 1, "role"), "", "none of the inputs x, t, y is a time"),
        ((*GRAPH, "inputs", 2, "role"), "", "nothing feeds the input y"),
        ((*GRAPH, "outputs", 0, "name"), None, "networks.denoiser.graphs"),
        ((*GRAPH, "outputs", 0, "shape"), ["B", 5, 16, 16], "out is ['B', 5, 16, 16]"),
        ((*DENOISER, "graphs"), {}, "networks.denoiser.graphs is empty"),
    ],
)
def test_what_is_refused_is_named(plain: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    bundle = load_bundle(plain)
    with pytest.raises(InputError) as refused:
        OpenProgram(Bundle(plain, mutated(dict(bundle.manifest), [(path, value)]))).rehearse()
    assert message in str(refused.value)
    assert len(str(refused.value)) < 700
    assert refused.value.hint


@pytest.mark.parametrize(
    "shares", [(0.4, 0.4), (-0.5, 1.5), (float("nan"), 1.0), (1e300, 0.0), (1.0,), (0.2, 0.3, 0.5)]
)
def test_shares_that_do_not_share_out(stitched: Path, shares: tuple[float, ...]) -> None:
    manifest = copy.deepcopy(dict(load_bundle(stitched).manifest))
    manifest["program"]["route"] = [{"share": share, "every": None} for share in shares]
    with pytest.raises(InputError, match=r"do not share out|\$\.route|cannot be stitched"):
        OpenProgram(Bundle(stitched, manifest))


@pytest.mark.parametrize("name", ["../other", "/tmp", "denoiser/x", "Denoiser", "denoiser.x", "judge", ""])
def test_networks_that_there_are_not(plain: Path, name: str) -> None:
    manifest = copy.deepcopy(dict(load_bundle(plain).manifest))
    manifest["networks"] = {name: manifest["networks"]["denoiser"]}
    with pytest.raises(InputError, match=r"network |no role judge"):
        OpenProgram(Bundle(plain, manifest))


@pytest.mark.parametrize("name", ["../other", "missing", "a/b", "A"])
def test_graphs_that_are_not_hashed(plain: Path, name: str) -> None:
    manifest = copy.deepcopy(dict(load_bundle(plain).manifest))
    graphs = manifest["networks"]["denoiser"]["graphs"]
    graphs[name] = graphs["model"]
    with pytest.raises(InputError, match="is not in the bundle"):
        OpenProgram(Bundle(plain, manifest))


def engine(file: str = "model.onnx", **fields: Any) -> dict[str, Any]:
    facts = {"file": file, "flavour": "tensorrt", "version": "1", "targets": ["sm89"]}
    return {**facts, "fingerprint": {"shapes": {"x": [[1, 4, 16, 16]] * 3}}, **fields}


@pytest.mark.parametrize(
    ("field", "recorded"),
    [
        ("engine.file", engine("../evil.plan")),
        ("engine.file", engine("/tmp/evil.plan")),
        ("flavour", engine(flavour=1)),
        ("targets", engine(targets=[89])),
        ("fingerprint", engine(fingerprint={"shapes": {"x": [[1], [1, 2], [1]]}})),
        ("fingerprint", engine(fingerprint={"shapes": {"x": [[2], [1], [1]]}})),
        ("flavour", {"file": "model.onnx"}),
    ],
)
def test_an_engine_that_is_not_hashed_or_not_described(plain: Path, field: str, recorded: dict[str, Any]) -> None:
    manifest = copy.deepcopy(dict(load_bundle(plain).manifest))
    manifest["networks"]["denoiser"]["graphs"]["model"]["engine"] = recorded
    with pytest.raises(InputError, match=field):
        read_facts(Bundle(plain, manifest).network)


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Bundle]:
    """A bundle whose manifest was changed; nobody hashes that."""

    def change(apply: Callable[[dict[str, Any]], Any]) -> Bundle:
        folder = shutil.copytree(plain, tmp_path / "changed")
        manifest = json.loads((folder / MANIFEST).read_text())
        apply(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return load_bundle(folder)

    return change


def test_brackets_in_a_manifest_are_shown_as_they_are(changed: Callable[..., Bundle]) -> None:
    bundle = changed(lambda manifest: manifest.update(name="[/x]", dexport="[red]\x1b[2J"))
    shown = CliRunner().invoke(main, ["info", str(bundle.path)])
    assert shown.exit_code == 0
    assert ": [/x]," in shown.stdout
    assert "[red]\\x1b[2J" in shown.stdout


@pytest.mark.parametrize("schema", [1, 3])
def test_another_schema(changed: Callable[..., Bundle], schema: int) -> None:
    with pytest.raises(InputError, match=f"has manifest schema {schema}; this dexport reads 2") as refused:
        changed(lambda manifest: manifest.update(schema=schema))
    assert refused.value.hint == ("build the bundle again" if schema == 1 else "pip install --upgrade dexport")
