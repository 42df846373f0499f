"""Latents to images: tiles that decode as the whole does, pixel shuffling, and rounding to bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dexport.errors import UsageError
from dexport.runtime.decode import MAX_BATCH, CodeDecoder, PixelShuffle, VaeDecoder, to_uint8

SCALE = 0.18215
FACTOR = 2


class LocalDecoder:
    """A session that blurs over ``radius`` cells with zero padding, then doubles the resolution."""

    def __init__(self, tile: tuple[Any, Any], radius: int = 0, batch: int | str = "B") -> None:
        self.inputs = {"z": SimpleNamespace(shape=[batch, 3, *tile])}
        self.radius = radius
        self.batches: list[int] = []

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        z = torch.from_numpy(inputs["z"])
        _, _, *shape = self.inputs["z"].shape
        assert all(isinstance(want, str) or have == want for have, want in zip(z.shape[2:], shape, strict=True))
        self.batches.append(len(z))
        blurred = F.avg_pool2d(z, 2 * self.radius + 1, stride=1, padding=self.radius)
        return {"image": F.interpolate(blurred, scale_factor=FACTOR, mode="nearest").numpy()}


def latents(seed: int, *shape: int) -> np.ndarray:
    """Latents in the denoiser's scale that stay inside of the range when decoded."""
    return (np.random.default_rng(seed).uniform(-1, 1, shape) * SCALE).astype(np.float32)


def whole(radius: int, z: np.ndarray) -> np.ndarray:
    return VaeDecoder(LocalDecoder(("h", "w"), radius), SCALE)(z)


@settings(deadline=None, max_examples=50)
@given(
    tile=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    more=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    overlap=st.floats(0, 0.7),
    batch=st.integers(1, 3),
)
def test_tiles_decode_as_the_whole_does(
    tile: tuple[int, int], more: tuple[int, int], overlap: float, batch: int
) -> None:
    """Where the receptive field is at most a quarter of the overlap."""
    radius = min(int(side * overlap) for side in tile) // 4
    z = latents(0, batch, 3, tile[0] + more[0], tile[1] + more[1])
    got = VaeDecoder(LocalDecoder(tile, radius), SCALE, overlap)(z)
    np.testing.assert_allclose(got, whole(radius, z), atol=1e-6)


def test_wider_receptive_fields_are_only_close() -> None:
    z = latents(0, 1, 3, 40, 40)
    error = np.abs(VaeDecoder(LocalDecoder((16, 16), 3), SCALE)(z) - whole(3, z))
    assert 0 < error.max() < 0.5


def test_a_latent_of_the_graph_s_size_is_decoded_once_unscaled() -> None:
    session = LocalDecoder((6, 5))
    z = latents(1, 2, 3, 6, 5)
    images = VaeDecoder(session, SCALE)(z)
    assert session.batches == [2]
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[:, :, ::FACTOR, ::FACTOR], z / SCALE, rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "rows", "expected"),
    [("B", 3, [3]), ("B", 2 * MAX_BATCH + 1, [MAX_BATCH, MAX_BATCH, 1]), (2, 5, [2, 2, 2]), (4, 1, [4])],
)
def test_batches_are_those_that_the_graph_takes(batch: int | str, rows: int, expected: list[int]) -> None:
    session = LocalDecoder((4, 4), batch=batch)
    z = latents(2, rows, 3, 4, 4)
    images = VaeDecoder(session, SCALE)(z)
    assert session.batches == expected
    np.testing.assert_allclose(images[:, :, ::FACTOR, ::FACTOR], z / SCALE, rtol=1e-6)


def test_images_are_clipped() -> None:
    images = VaeDecoder(LocalDecoder((2, 2)), 1.0)(np.array([-3, -1, 0.5, 3] * 3, np.float32).reshape(1, 3, 2, 2))
    assert np.unique(images).tolist() == [-1, 0.5, 1]


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 1)])
def test_a_latent_smaller_than_a_tile_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"{shape[0]}x{shape[1]} is smaller than the tiles of 4x4") as caught:
        VaeDecoder(LocalDecoder((4, 4)), SCALE)(latents(0, 1, 3, *shape))
    assert f"--latent {shape[0]}x{shape[1]}" in caught.value.hint


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4), (1, 3, 4, 0)])
def test_what_is_no_latent_is_refused(shape: tuple[int, ...]) -> None:
    for decoder in (VaeDecoder(LocalDecoder((4, 4)), SCALE), PixelShuffle(2)):
        with pytest.raises(UsageError, match="latents have shape"):
            decoder(np.zeros(shape, np.float32))


@pytest.mark.parametrize(("scale", "overlap"), [(0.0, 0.25), (float("nan"), 0.25), (1.0, 1.0), (1.0, -0.1)])
def test_impossible_arguments_are_refused(scale: float, overlap: float) -> None:
    with pytest.raises(UsageError):
        VaeDecoder(LocalDecoder((4, 4)), scale, overlap)


def test_a_denoiser_is_no_decoder() -> None:
    session = LocalDecoder((4, 4))
    session.inputs = {"x": None, "t": None}
    with pytest.raises(UsageError, match="takes x, t, but a decoder takes z"):
        VaeDecoder(session, SCALE)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_pixel_shuffle_is_that_of_torch(batch: int, channels: int, factor: int, size: tuple[int, int]) -> None:
    z = np.random.default_rng(0).uniform(-1, 1, (batch, channels * factor**2, *size)).astype(np.float32)
    expected = F.pixel_shuffle(torch.from_numpy(z), factor).numpy()
    np.testing.assert_array_equal(PixelShuffle(factor)(z), expected)


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_tiles_are_thumbnails(channels: int, factor: int, tiles: int, size: tuple[int, int]) -> None:
    height, width = (side * tiles * factor for side in size)
    image = np.random.default_rng(0).uniform(-1, 1, (1, channels, height, width)).astype(np.float32)
    rows = [np.concatenate([image[..., i::tiles, j::tiles] for j in range(tiles)], axis=3) for i in range(tiles)]
    latents = F.pixel_unshuffle(torch.from_numpy(np.concatenate(rows, axis=2)), factor).numpy()
    np.testing.assert_array_equal(PixelShuffle(factor, tiles)(latents), image)


def test_pixel_shuffle_clips_and_refuses() -> None:
    assert PixelShuffle(1)(np.full((1, 1, 1, 1), 7.0)).item() == 1
    with pytest.raises(UsageError, match="6 channels are no multiple of 4"):
        PixelShuffle(2)(np.zeros((1, 6, 2, 2)))
    with pytest.raises(UsageError, match="factor of 0"):
        PixelShuffle(0)
    with pytest.raises(UsageError, match="4x6 pixels are no sheet of 4x4"):
        PixelShuffle(2, 4)(np.zeros((1, 4, 2, 3)))


def test_bytes_are_rounded_half_to_even_and_clipped() -> None:
    values = np.array([-2, -1, -1 + 1 / 255, -1 + 3 / 255, 0, 1, 2], np.float64).astype(np.float32)
    # 0 is 127.5 and 127 + 1/2 rounds to 128; the fractions of 255 are 0.5 and 1.5 but for the float32 of the input.
    levels = to_uint8(values.reshape(1, 1, 1, -1))
    assert levels.dtype == np.uint8
    expected = np.clip(np.rint((values + np.float32(1)) * np.float32(127.5)), 0, 255)
    assert levels.ravel().tolist() == expected.tolist()
    assert levels.ravel()[[0, 1, 4, 5, 6]].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(np.zeros((2, 3, 4, 5))).shape == (2, 4, 5, 3)


@given(st.integers(0, 255))
def test_bytes_survive_the_round_trip(level: int) -> None:
    image = np.full((1, 1, 1, 1), level / 127.5 - 1, np.float32)
    assert to_uint8(image).item() == level


class Codes:
    """A session that shows codes of 2 x 3 as grey pixels, 0 as black and 4 as white."""

    def __init__(self, places: tuple[int, ...], black: float = -1.0, batch: int | str = "B") -> None:
        self.inputs = {"z": SimpleNamespace(shape=[batch, *places])}
        self.black = black
        self.batches: list[int] = []

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        z = inputs["z"]
        assert z.dtype == np.int64
        assert list(z.shape[1:]) == self.inputs["z"].shape[1:]
        self.batches.append(len(z))
        grey = self.black + z.reshape(-1, 1, 2, 3) / 4 * (1 - self.black)
        return {"image": grey.astype(np.float32)}


CODES = np.arange(30).reshape(5, 2, 3) % 5


@pytest.mark.parametrize("black", [-1.0, 0.0])
@pytest.mark.parametrize("places", [(6,), (2, 3)])
@pytest.mark.parametrize("given", [CODES, CODES.reshape(5, 6), CODES.astype(np.int32)])
def test_codes_in_any_shape_become_pictures(given: np.ndarray, places: tuple[int, ...], black: float) -> None:
    session = Codes(places, black)
    pictures = CodeDecoder(session, black)(given)
    np.testing.assert_allclose(pictures, CODES[:, None] / 2 - 1, atol=1e-6)
    assert (pictures.dtype, session.batches) == (np.float32, [MAX_BATCH, 1])


def test_codes_in_a_fixed_batch() -> None:
    session = Codes((6,), batch=2)
    assert CodeDecoder(session)(CODES).shape == (5, 1, 2, 3)
    assert session.batches == [2, 2, 2]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES[:, :1], r"codes are int64 \[5, 1, 3\], and this decoder takes 6 whole numbers a picture"),
        (CODES.astype(np.float32), "codes are float32"),
        (CODES[:0], "0, 2, 3"),
    ],
)
def test_what_are_no_codes_of_a_picture_is_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CodeDecoder(Codes((6,)))(codes)


def test_a_session_of_something_else_is_no_decoder_of_codes() -> None:
    session = Codes((6,))
    session.inputs = {"x": session.inputs["z"], "t": session.inputs["z"]}
    with pytest.raises(UsageError, match="takes x, t, but a decoder takes codes"):
        CodeDecoder(session)


def test_latents_whose_pictures_are_black_at_zero() -> None:
    session = LocalDecoder((4, 4))
    z = latents(0, 1, 3, 4, 4)
    np.testing.assert_allclose(
        VaeDecoder(session, SCALE, black=0.0)(z), np.clip(2 * VaeDecoder(session, SCALE)(z) - 1, -1, 1), atol=1e-6
    )
