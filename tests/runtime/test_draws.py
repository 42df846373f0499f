"""Draws: one stream per image, recordings that replay, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dexport.errors import InputError, UsageError
from dexport.runtime.draws import Draws, Replay, choose


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


def test_choices_have_their_probabilities() -> None:
    likely = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    draws = Draws(0, images=[0, 1])
    chosen = draws.categorical(np.tile(likely, (2, 50_000, 1)))
    assert chosen.dtype == np.int64 and chosen.shape == (2, 50_000)
    shares = np.bincount(chosen.ravel(), minlength=5) / chosen.size
    np.testing.assert_allclose(shares, likely, atol=0.006)
    assert shares[1] == 0
    assert abs(np.corrcoef(chosen[0], chosen[1])[0, 1]) < 0.02
    assert abs(np.corrcoef(chosen[0, :-1], chosen[0, 1:])[0, 1]) < 0.02


def test_flat_choices_are_flat_however_many_there_are() -> None:
    chosen = Draws(1, images=[0]).categorical(np.ones((1, 1_000, 1_024)))
    assert abs(chosen.mean() - 511.5) < 30
    assert len(np.unique(chosen)) > 580  # 1024 * (1 - exp(-1000 / 1024)) = 638 are expected


def test_a_small_error_changes_few_choices() -> None:
    """Of thousands of candidates: by cumulated probabilities, one choice in ten would be another."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((600, 4096))
    numbers = Draws(0, images=[0]).choices((1, 600))[0]
    first, second = (choose(numbers, np.exp(x)) for x in (logits, logits + 1e-3 * rng.standard_normal(logits.shape)))
    assert (first != second).mean() < 0.006


def test_choices_may_be_recorded_themselves() -> None:
    replay = Replay([np.array([[1, 0, 2]], np.int32)])
    chosen = replay.categorical(np.full((1, 3, 3), 1 / 3))
    assert chosen.tolist() == [[1, 0, 2]] and chosen.dtype == np.int64
    with pytest.raises(UsageError, match="the choice 2 of 2"):
        Replay([np.array([[1, 0, 2]], np.int32)]).categorical(np.full((1, 3, 2), 1 / 2))
