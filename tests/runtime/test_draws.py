"""Draws: one stream per image, recordings that replay, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dexport.errors import InputError, UsageError
from dexport.runtime.draws import Draws, Replay


def test_an_image_does_not_depend_on_its_batch() -> None:
    together = Draws(0, images=[0, 1, 2])
    alone = Draws(0, images=[2])
    for _ in range(3):
        np.testing.assert_array_equal(together.normal((3, 4, 2))[2], alone.normal((1, 4, 2))[0])


def test_draws_are_standard_normal_and_differ() -> None:
    noise = Draws(1, images=[0, 1])
    first, second = noise.normal((2, 100, 100)), noise.normal((2, 100, 100))
    assert first.dtype == np.float32
    assert abs(first.mean()) < 0.05
    assert abs(first.std() - 1) < 0.05
    assert abs((first * second).mean()) < 0.05
    assert abs((first[0] * first[1]).mean()) < 0.05
    assert noise.draws == []


def test_a_recording_survives_the_disk(tmp_path: Path) -> None:
    noise = Draws(5, images=[3, 4], record=True)
    drawn = [noise.normal((2, 4)), noise.normal((2, 5))]
    noise.save(tmp_path / "noise.rec")
    replay = Replay.load(tmp_path / "noise.rec")
    for draw in drawn:
        np.testing.assert_array_equal(replay.normal(draw.shape), draw)


def test_a_replay_says_what_does_not_fit() -> None:
    replay = Replay([np.zeros((2, 3))])
    with pytest.raises(UsageError, match=r"shape \[2, 3\], but \[1, 3\]"):
        replay.normal((1, 3))
    replay.normal((2, 3))
    with pytest.raises(UsageError, match="holds 1 draws"):
        replay.normal((2, 3))
    with pytest.raises(UsageError, match="holds 0 draws"):
        Replay([]).normal((2, 3))


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed -1"):
        Draws(-1, images=[0])
    with pytest.raises(UsageError, match="2 images cannot fill a batch of 3"):
        Draws(0, images=[0, 1]).normal((3, 4))
    with pytest.raises(InputError, match="no recorded draws"):
        Replay.load(tmp_path / "missing.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_files_that_hold_no_recording_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "noise.npz").write_bytes(content)
    with pytest.raises(InputError, match="no recorded draws") as error:
        Replay.load(tmp_path / "noise.npz")
    assert error.value.hint
