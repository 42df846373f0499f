"""Requests for pictures, answered together: each as if it were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dexport.errors import UsageError
from dexport.runtime.noise import Noise
from dexport.runtime.pipeline import Pipeline
from dexport.runtime.service import Picture, make_pictures


@pytest.fixture(scope="module")
def pipeline(plain: Path) -> Pipeline:
    return Pipeline.open(plain)


def alone(pipeline: Pipeline, picture: Picture) -> np.ndarray:
    assert picture.label is not None
    latents = pipeline.sample(
        [picture.label],
        Noise(picture.seed, [0]),
        sampler=pipeline.sampler(steps=picture.steps),
        cfg_scale=picture.cfg_scale,
    )
    return pipeline.images(latents)[0]


def test_pictures_are_those_of_a_request_alone(pipeline: Pipeline) -> None:
    requests = [
        [Picture(3, seed=7, steps=2), Picture(4, seed=8, steps=2)],
        [Picture(3, seed=7, steps=3, cfg_scale=1.0)],
        [Picture(1, seed=9, steps=2), Picture(1, seed=9, steps=3, cfg_scale=1.0), Picture(2, seed=0, steps=2)],
    ]
    for batch in (1, 2, 8):
        for pictures, answer in zip(requests, make_pictures(pipeline, requests, batch), strict=True):
            assert isinstance(answer, np.ndarray)
            expected = np.stack([alone(pipeline, picture) for picture in pictures])
            # Other batches may round otherwise in the last bit.
            assert np.abs(answer.astype(int) - expected).max() <= 1


def test_equal_settings_share_batches(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    own = pipeline.sample
    monkeypatch.setattr(
        pipeline, "sample", lambda labels, *rest, **more: sizes.append(len(labels)) or own(labels, *rest, **more)
    )
    make_pictures(pipeline, [[Picture(label, 0, steps=2)] for label in range(5)] + [[Picture(0, 0, steps=3)]], 4)
    assert sizes == [4, 1, 1]


@pytest.mark.parametrize(
    ("pictures", "match"),
    [
        ([], "no pictures"),
        ([Picture(10, 0)], "no class 10"),
        ([Picture(-1, 0)], "no class -1"),
        ([Picture(None, 0)], "labels go with"),
        ([Picture(0, -1)], "seed -1"),
        ([Picture(0, 0, cfg_scale=0.5)], "guidance scale 0.5"),
        ([Picture(0, 0, cfg_scale=float("nan"))], "guidance scale nan"),
        ([Picture(0, 0, steps=0)], "0 steps"),
        ([Picture(0, 0, steps=1001)], "1001 steps"),
        ([Picture(0, 0, steps=2), Picture(11, 0, steps=2)], "no class 11"),
    ],
)
def test_a_wrong_request_is_told_and_the_others_are_answered(
    pipeline: Pipeline, pictures: list[Picture], match: str
) -> None:
    wrong, right = make_pictures(pipeline, [pictures, [Picture(0, 0, steps=2)]], 4)
    assert isinstance(wrong, UsageError)
    assert match in str(wrong)
    assert isinstance(right, np.ndarray)


def test_rows_have_seeds_of_their_own() -> None:
    rows = Noise.of_seeds([5, 5, 6]).normal((3, 4))
    assert np.array_equal(rows[0], Noise(5, [0]).normal((1, 4))[0])
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
