"""Nothing is made into a picture that is none: whatever decodes, and whoever asks for pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dexport.cli.sweep_points import points_of
from dexport.errors import DexportError, GateError, InputError
from dexport.runtime.decode import PixelShuffle, VaeDecoder, clipped, to_uint8
from dexport.runtime.draws import Draws
from dexport.runtime.generate import SampleRequest, generate
from dexport.runtime.programs.diffusion import Diffusion
from dexport.runtime.programs.program import Request
from dexport.runtime.samplers import Step as SamplerStep
from dexport.runtime.service import Picture, make_pictures
from dexport.validate.images.sampled_sets import sample_set
from dexport.validate.levels.trajectory import check_trajectory
from dexport.validate.sweep import sweep
from tests.runtime.running import latents, with_session

BAD = [np.nan, np.inf, -np.inf]


class Zeros:
    """A denoiser that predicts nothing."""

    runner = "zeros"

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"out": np.zeros((len(inputs["x"]), 8, 16, 16), np.float32)}


class Session:
    """A decoder's session that makes the same picture of every latent."""

    inputs = {"z": SimpleNamespace(shape=["B", 4, 4, 4])}  # noqa: RUF012

    def __init__(self, image: np.ndarray) -> None:
        self.image = image

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": np.repeat(self.image, len(inputs["z"]), axis=0)}


def one_bad(value: float, dtype: str = "float32") -> np.ndarray:
    image = np.zeros((1, 3, 8, 8), dtype)
    image[0, 1, 2, 3] = value
    return image


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("side", [4, 6])
def test_one_value_of_a_decoder_that_is_not_finite_is_enough(value: float, dtype: str, side: int) -> None:
    with pytest.raises(GateError, match="decoder made values that are not finite"):
        VaeDecoder(Session(one_bad(value, dtype)), 1.0)(np.zeros((2, 4, side, side), np.float32))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("decode", [to_uint8, clipped, lambda images: PixelShuffle(2)(images.repeat(4, axis=1))])
def test_what_has_no_network_is_held_to_the_same(value: float, decode: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(GateError, match="not finite"):
        decode(one_bad(value))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((1, 3, 8, 8), np.int64),
        np.zeros((1, 3, 8, 8), bool),
        np.zeros((1, 3, 8, 8), np.complex64),
        np.zeros((1, 3, 8), np.float32),
        np.zeros((1, 3, 9, 8), np.float32),
        np.zeros((1, 3, 8, 12), np.float32),
        np.zeros((1, 3, 2, 2), np.float32),
        np.zeros((2, 3, 8, 8), np.float32),
        np.zeros((1, 0, 8, 8), np.float32),
    ],
)
def test_something_else_than_pictures(image: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"made (pictures of shape|\w+ values, expected float32)|gave image of shape"):
        VaeDecoder(Session(image), 1.0)(np.zeros((1, 4, 4, 4), np.float32))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_no_picture_has(channels: int) -> None:
    with pytest.raises(InputError, match="1 or 3 channels"):
        to_uint8(np.zeros((1, channels, 4, 4), np.float32))


def users(plain: Path, stitched: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    settings = {"steps": 2, "cfg_scale": 1.0}
    single, pair = (with_session(path, Zeros()).with_settings(**settings) for path in (plain, stitched))
    of_set: dict[str, Any] = {"seed": 0, "batch": 2, "on_progress": lambda *_: None}
    return {
        "sample": lambda: generate(single, tmp_path / "grid.png", SampleRequest((1,))),
        "service": lambda: _raised(make_pictures(single, [[Picture(1, 0)]], 1)[0]),
        "distribution": lambda: sample_set(single, tmp_path / "work", "bundle", {}, [1, 2], **of_set),
        "trajectory": lambda: check_trajectory(single, single, [1], gate_snr_db=1.0),
        "sweep": lambda: sweep(pair, *points_of(pair, "", [0.5]), count=1, batch=10),
    }


def _raised(answer: Any) -> None:
    assert isinstance(answer, DexportError)
    raise answer


def decoding(monkeypatch: pytest.MonkeyPatch, decode: Callable[[np.ndarray], np.ndarray]) -> None:
    monkeypatch.setattr("dexport.runtime.programs.diffusion.decoder_of", lambda _calls, _decoding: decode)


@pytest.mark.parametrize("user", ["sample", "service", "distribution", "trajectory", "sweep"])
@pytest.mark.parametrize("value", BAD)
def test_all_who_make_pictures_refuse(
    user: str, value: float, plain: Path, stitched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = users(plain, stitched, tmp_path)[user]
    decoding(monkeypatch, lambda latents: np.full((len(latents), 1, 32, 32), value, np.float32))
    with pytest.raises(GateError, match="not finite"):
        use()
    assert not list(tmp_path.rglob("0*.png"))


@pytest.mark.parametrize("value", [*BAD, 1e300])
def test_latents_that_are_not_finite_are_not_decoded(
    value: float, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sampler:
        clock = None

        def start(self, _draws: Draws, shape: tuple[int, ...]) -> np.ndarray:
            return np.zeros(shape)

        def run(self, _denoiser: object, x: np.ndarray, _draws: Draws) -> Iterator[SamplerStep]:
            yield SamplerStep(0, 0.0, np.full(x.shape, value), x)

    program = with_session(plain, Zeros())
    monkeypatch.setattr(Diffusion, "make_sampler", lambda _self: Sampler())
    decoding(monkeypatch, lambda _latents: pytest.fail("they were decoded"))
    steps = []
    with pytest.raises(GateError, match="not finite"), np.errstate(over="ignore"):
        for step in program.run(Request(1, (1,)), Draws(0, [0])):
            steps.append(step)
    assert [step.results for step in steps] == [{}]


def test_as_many_pictures_as_latents(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding(monkeypatch, lambda _latents: np.zeros((1, 1, 32, 32), np.float32))
    with pytest.raises(InputError, match="1 pictures of 2 latents"):
        latents(with_session(plain, Zeros()), [1, 2])
