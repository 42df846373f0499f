"""Any batch through sessions that take some only: engines of every profile, and graphs whose batch is fixed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dexport.bundle import Bundle, load_bundle
from dexport.errors import InputError
from dexport.model_repository import _why_not
from dexport.runtime.batches import BatchRange, InBatches, batch_range
from dexport.runtime.decode import VaeDecoder
from dexport.runtime.engine_checks import check_ranges, read_facts
from dexport.runtime.generate import SampleRequest, generate
from dexport.runtime.service import Picture, make_pictures
from dexport.runtime.session import open_session
from dexport.runtime.tensorrt_session import TensorRtSession
from tests.runtime.fake_gpu import FakeTensorRt, manifest, write_bundle
from tests.runtime.running import latents, with_session

RANGES = [(1, 1), (1, 3), (3, 3), (4, 8), (8, 8)]


def engine_of(least: int, most: int) -> dict[str, Any]:
    batches = (least, most, most)
    shapes = {"x": [[b, 4] for b in batches], "y": [[b] for b in batches], "scale": [[], [], []]}
    return manifest(fingerprint={"shapes": shapes})["engine"]


@pytest.mark.parametrize(("least", "most"), RANGES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 17])
def test_an_engine_gives_the_rows_that_were_asked_for(
    least: int,
    most: int,
    rows: int,
    tmp_path: Path,
    trt: FakeTensorRt,  # noqa: ARG001
) -> None:
    with TensorRtSession(write_bundle(tmp_path / "out", engine=engine_of(least, most)).network) as session:
        assert session.batch_range == BatchRange(least, most)
        x, y = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4), np.arange(rows)
        out = InBatches(session)(x=x, y=y, scale=np.float32(3))["out"]
    np.testing.assert_array_equal(out, x * 3 + y[:, None])


class Engine:
    """A denoiser, or a decoder, that takes batches of a range only; rows do not depend on each other."""

    runner = "engine"

    def __init__(self, run: Callable[..., Any], least: int, most: int) -> None:
        self.run, self.batch_range, self.seen = run, BatchRange(least, most), []
        self.inputs = {"z": SimpleNamespace(shape=["B", 1, 4, 4])}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        (count,) = {len(array) for array in inputs.values() if array.ndim}
        self.seen.append(count)
        assert self.batch_range.least <= count <= (self.batch_range.most or count)
        return self.run(**inputs)


@pytest.mark.parametrize(("least", "most"), RANGES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_doubles_the_batch_of_no_engine_beyond_its_range(
    least: int, most: int, scale: float, plain: Path
) -> None:
    session = open_session(load_bundle(plain).network)
    settings = {"steps": 2, "cfg_scale": scale}
    free = with_session(plain, session).with_settings(**settings)
    limited = with_session(of_batch(plain, least, most), Engine(session, least, most)).with_settings(**settings)
    limited._provider = "tensorrt"
    assert limited.largest_batch() == max(1, most // (2 if scale > 1 else 1))
    wanted, got = (latents(program, range(5), **settings) for program in (free, limited))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def of_batch(path: Path, least: int, most: int) -> Bundle:
    """The bundle, as if it had been built for another range."""
    manifest = copy.deepcopy(dict(load_bundle(path).manifest))
    manifest["networks"]["denoiser"]["batch"] = {"min": least, "opt": most, "max": most}
    return Bundle(path, manifest)


@pytest.mark.parametrize(("least", "most"), RANGES)
def test_pictures_and_requests_of_engines_with_a_narrow_profile(
    least: int, most: int, plain: Path, tmp_path: Path
) -> None:
    bundle = of_batch(plain, least, most)
    program = with_session(bundle, Engine(open_session(bundle.network), least, most)).with_settings(steps=2)
    program._provider = "tensorrt"
    assert generate(program, tmp_path / "grid.png", SampleRequest((1, 2), count=2, batch=3)).made == 4
    (answer,) = make_pictures(program, [[Picture(label, 0) for label in range(3)]], 0)
    assert isinstance(answer, np.ndarray)
    assert answer.shape == (3, 32, 32, 1)


@pytest.mark.parametrize(("least", "most"), RANGES)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_decoder_s_engine(least: int, most: int, rows: int) -> None:
    z = np.random.default_rng(0).uniform(-1, 1, (rows, 1, 4, 4)).astype(np.float32)
    decoder = VaeDecoder(Engine(lambda z: {"image": z}, least, most), 1.0)
    np.testing.assert_array_equal(decoder(z), z)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["B", 4], BatchRange()),
        ([None, 4], BatchRange()),
        ([8, 4], BatchRange(8, 8)),
        ([1, 4], BatchRange(1, 1)),
        ([], BatchRange()),
    ],
)
def test_a_graph_says_by_its_first_input_whether_its_batch_is_fixed(shape: list[Any], expected: BatchRange) -> None:
    session = SimpleNamespace(inputs={"x": SimpleNamespace(shape=shape), "scale": SimpleNamespace(shape=[1])})
    assert batch_range(session) == expected
    assert batch_range(lambda **_: {}) == BatchRange()


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_a_graph_of_a_fixed_batch_samples_any_number(rows: int) -> None:
    seen: list[int] = []

    def static(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(len(inputs["x"]))
        return {"out": inputs["x"] + inputs["t"][:, None]}

    static.inputs = {"x": SimpleNamespace(shape=[4, 2])}  # type: ignore[attr-defined]
    x, t = np.arange(rows * 2.0).reshape(rows, 2), np.arange(float(rows))
    np.testing.assert_array_equal(InBatches(static)(x=x, t=t)["out"], x + t[:, None])
    assert set(seen) == {4}


@pytest.mark.parametrize("out", [np.zeros((1, 2)), np.zeros((3, 2)), np.zeros(())])
def test_other_rows_than_were_given_are_refused(out: np.ndarray) -> None:
    with pytest.raises(InputError, match="the model gave out of shape"):
        InBatches(lambda **_: {"out": out})(x=np.zeros((2, 2)))


def test_an_engine_whose_shapes_are_not_recorded(tmp_path: Path) -> None:
    shapes = {"x": [[1, 4], [2, 4], [8, 4]]}
    facts = read_facts(
        write_bundle(tmp_path / "out", engine=manifest(fingerprint={"shapes": shapes})["engine"]).network
    )
    with pytest.raises(InputError, match="does not say which shapes of y"):
        check_ranges(facts, {"x": np.zeros((2, 4)), "y": np.zeros(2)})


@pytest.mark.parametrize(
    ("engine", "least", "first", "reason"),
    [
        (True, 8, "B", "its engine takes 8 or more"),
        (True, 1, "B", ""),
        (False, 8, "B", ""),
        (False, 1, 8, "its batch is fixed at 8"),
    ],
)
def test_triton_serves_alone_what_takes_every_batch(
    engine: bool, least: int, first: Any, reason: str, tmp_path: Path
) -> None:
    own = manifest()
    io = {**own["io"], "inputs": [{"name": "x", "dtype": "float32", "shape": [first, 4]}]}
    given = {"engine": own["engine"] if engine else None, "batch": {**own["batch"], "min": least}, "io": io}
    found = _why_not(write_bundle(tmp_path / "out", **given).network, "model")
    assert found.endswith(reason) and bool(found) == bool(reason)
