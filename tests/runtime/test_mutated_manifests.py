"""Whatever a manifest says: a pipeline opens and plans quickly, or the manifest is refused as a bad input."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dexport.runtime.pipeline import Pipeline, sampler_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dexport.bundle import MANIFEST, Bundle, load_bundle
from dexport.errors import InputError
from dexport.validate.levels.trajectory import captions

SECONDS = 5
SECTIONS = ("sampling", "io", "batch", "guidance", "name", "stitch", "parts")
ABSURD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 7, 10**5, 10**9, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e300, -1e300, 1e-300,
        float("nan"), float("inf"), float("-inf"), "", "B", "edm", "flow", "ddim", "dpm-solver", "none", "y", "x", "t",
        "sigma", "log_snr", "out", "cfg_scale", "word", "9" * 5000, "\x1b]0;a\x07", "sd-vae-decoder", "pixel-shuffle-0",
        "pixel-shuffle-99999999999", "pixel-shuffle-2-tiles-999999999", "pixel-shuffle-x", "pixel-shuffle-1",
        "all channels", "all channels, power-cosine over time, power abc",
        "all channels, power-cosine over time, power 1e999", [], {}, [[]], [None], ["B", 4, 10**5, 10**5],
        ["B", 10**9, 1, 1], ["B", 4, 16, 16], [8, 4, 16, 16], ["B"] * 4, ["B"] * 1000, [1] * 1000,
        {"rule": "all channels"},
        {"steps": 10**9, "times": [0.0]}, {"steps": 4, "times": [float("nan")]}, [float("nan"), 1], ["a"] * 10,
    ]
)  # fmt: skip


class Nothing:
    """In place of a network, of which nothing is run."""

    runner = "nothing"

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError(inputs)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def paths_of(manifest: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [path for path in places(manifest) if path and path[0] in SECTIONS]


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
        sampler_of(bundle)
        pipeline = Pipeline(bundle, sessions=[Nothing()] * max(1, len(bundle.stitch)), pictures=False)
        plan = pipeline.sampler()
        labels = [] if pipeline.classes is None else [0]
        pipeline.denoiser(labels, sampler=plan)
        assert pipeline.largest_batch() is None
        captions(pipeline, [0])
        for part in bundle.parts.values():
            assert part.manifest is not None
    except InputError as error:
        assert error.hint
    assert time.perf_counter() - started < SECONDS


@pytest.fixture(scope="module", params=["plain", "fused"])
def single(request: pytest.FixtureRequest) -> Bundle:
    return load_bundle(request.getfixturevalue(request.param))


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_denoiser_s_manifest(single: Bundle, data: st.DataObject) -> None:
    places = st.sampled_from(paths_of(dict(single.manifest)))
    changes = data.draw(st.lists(st.tuples(places, ABSURD | st.just(DELETED)), min_size=1, max_size=3))
    plan(Bundle(single.path, mutated(dict(single.manifest), changes)))


def test_every_field_with_every_value(single: Bundle) -> None:
    """One change at a time: what several hide, one shows."""
    manifest = dict(single.manifest)
    paths = [path for path in paths_of(manifest) if path[0] in ("sampling", "batch", "guidance")]
    for path in paths:
        for value in (DELETED, None, 10**9, -1, 0, 10**30, float("nan"), 1e300, "word", "9" * 5000, [], {}, True):
            plan(Bundle(single.path, mutated(manifest, [(path, value)])))


@pytest.fixture(scope="module")
def pair(stitched: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One that may be changed on the disk: parts are read from there."""
    return load_bundle(shutil.copytree(stitched, tmp_path_factory.mktemp("pair") / "pair"))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_stitched_manifest_and_its_parts(pair: Bundle, data: st.DataObject) -> None:
    files = [pair.path / MANIFEST, pair.path / "parts" / "0-bundle" / MANIFEST]
    file = data.draw(st.sampled_from(files))
    before = file.read_text()
    manifest = json.loads(before)
    changes = data.draw(
        st.lists(st.tuples(st.sampled_from(paths_of(manifest)), ABSURD | st.just(DELETED)), min_size=1, max_size=2)
    )
    try:
        changed = mutated(manifest, changes)
        file.write_text(json.dumps(changed))
        plan(Bundle(pair.path, changed if file == files[0] else pair.manifest))
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("sampling", "steps"), 10**9, "sampling.steps"),
        (("sampling", "steps"), 0, "sampling.steps"),
        (("sampling", "steps"), 1001, "sampling.sampler"),
        (("sampling", "sampler"), "euler", "sampling.sampler"),
        (("sampling", "classes"), 10**9, "sampling.classes"),
        (("sampling", "classes"), 0, "sampling.classes"),
        (("sampling", "latent_scale"), float("nan"), "sampling.latent_scale"),
        (("sampling", "latent_scale"), 0, "sampling.latent_scale"),
        (("sampling", "latent_scale"), 10**400, "sampling.latent_scale"),
        (("sampling", "guidance", "default_scale"), float("inf"), "sampling.guidance.default_scale"),
        (("sampling", "guidance", "default_scale"), 1e9, "sampling.guidance.default_scale"),
        (("sampling", "guidance", "rule"), "all channels, power-cosine over time, power abc", "sampling.guidance.rule"),
        (("sampling", "guidance", "rule"), "no such rule", "sampling.guidance.rule"),
        (("sampling", "decoder"), "pixel-shuffle-3", "sampling.decoder"),
        (("sampling", "decoder"), "pixel-shuffle-2-tiles-5", "sampling.decoder"),
        (("batch", "max"), 10**9, "batch.max"),
        (("io", "inputs", 0, "shape"), ["B", 4, 10**5, 10**5], "io.inputs[0].shape"),
        (("io", "inputs", 0, "shape"), ["B", 60_000, 4000, 4000], "io.inputs[0].shape"),
        (("io", "inputs", 1, "name"), "time", "io.inputs"),
        (("io", "inputs", 1, "name"), "x", "io.inputs"),
        (("io", "outputs", 0, "shape"), ["B", 5, 16, 16], "io.outputs"),
    ],
)
def test_what_is_refused_is_named(plain: Path, path: tuple[Any, ...], value: Any, field: str) -> None:
    bundle = load_bundle(plain)
    with pytest.raises(InputError) as refused:
        Pipeline(Bundle(plain, mutated(dict(bundle.manifest), [(path, value)])), sessions=[Nothing()])
    assert f"is incomplete: {field} is missing, or" in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("fractions", [(0.4, 0.4), (-0.5, 1.5), (float("nan"), 1.0), (1e300, 0.0)])
def test_shares_that_do_not_share_out(pair: Bundle, fractions: tuple[float, float]) -> None:
    entries = [{**entry, "fraction": share} for entry, share in zip(pair.manifest["stitch"], fractions, strict=True)]
    with pytest.raises(InputError, match=r"stitch is missing, or .*do not share out"):
        Pipeline(Bundle(pair.path, {**pair.manifest, "stitch": entries}), sessions=[Nothing(), Nothing()])
