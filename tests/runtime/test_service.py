"""Requests for pictures, answered together: each as if it were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Request
from dexport.runtime.service import Picture, Service, Worker, make_pictures


@pytest.fixture(scope="module")
def program(plain: Path) -> OpenProgram:
    return OpenProgram.open(plain)


def picture(label: int | None, seed: int, **settings: object) -> Picture:
    return Picture(label, seed, settings)


def alone(program: OpenProgram, picture: Picture) -> np.ndarray:
    assert picture.label is not None
    chosen = program.with_settings(**picture.settings)
    return chosen.results(Request(1, (picture.label,)), Draws(picture.seed, [0]))[PICTURES][0]


def test_pictures_are_those_of_a_request_alone(program: OpenProgram) -> None:
    requests = [
        [picture(3, seed=7, steps=2), picture(4, seed=8, steps=2)],
        [picture(3, seed=7, steps=3, cfg_scale=1.0)],
        [picture(1, seed=9, steps=2), picture(1, seed=9, steps=3, cfg_scale=1.0), picture(2, seed=0, steps=2)],
    ]
    for batch in (1, 2, 8):
        for pictures, answer in zip(requests, make_pictures(program, requests, batch), strict=True):
            assert isinstance(answer, np.ndarray)
            expected = np.stack([alone(program, picture) for picture in pictures])
            # Other batches may round otherwise in the last bit.
            assert np.abs(answer.astype(int) - expected).max() <= 1


def test_equal_settings_share_batches(program: OpenProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    own = OpenProgram.run
    monkeypatch.setattr(
        OpenProgram, "run", lambda self, request, draws: sizes.append(request.count) or own(self, request, draws)
    )
    make_pictures(program, [[picture(label, 0, steps=2)] for label in range(5)] + [[picture(0, 0, steps=3)]], 4)
    assert sorted(sizes) == [1, 1, 4]


@pytest.mark.parametrize(
    ("pictures", "match"),
    [
        ([], "no pictures"),
        ([Picture(10, 0)], "no class 10"),
        ([Picture(-1, 0)], "no class -1"),
        ([Picture(None, 0)], "labels go with"),
        ([Picture(0, -1)], "seed -1"),
        ([picture(0, 0, cfg_scale=0.5)], "cfg_scale 0.5"),
        ([picture(0, 0, cfg_scale=float("nan"))], "cfg_scale nan"),
        ([picture(0, 0, steps=0)], "0 steps"),
        ([picture(0, 0, steps=1001)], "1001 steps"),
        ([picture(0, 0, steps=2), picture(11, 0, steps=2)], "no class 11"),
    ],
)
def test_a_wrong_request_is_told_and_the_others_are_answered(
    program: OpenProgram, pictures: list[Picture], match: str
) -> None:
    wrong, right = make_pictures(program, [pictures, [picture(0, 0, steps=2)]], 4)
    assert isinstance(wrong, UsageError)
    assert match in str(wrong)
    assert isinstance(right, np.ndarray)


def test_rows_have_seeds_of_their_own() -> None:
    rows = Draws.of_seeds([5, 5, 6]).normal((3, 4))
    assert np.array_equal(rows[0], Draws(5, [0]).normal((1, 4))[0])
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


class Turns:
    """A service whose steps are counted, and when its requests are answered."""

    def __init__(self, program: OpenProgram, batch: int = 4, most: int = 16) -> None:
        self.service, self.steps = Service(program, batch, most), 0
        self.done: dict[str, int] = {}

    def add(self, name: str, *pictures: Picture) -> None:
        self.service.add(pictures, lambda _answer: self.done.update({name: self.steps}))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.service.turn()
            self.steps += 1

    def finish(self) -> None:
        while self.service.busy:
            self.run(1)


@pytest.mark.parametrize("before", [0, 1, 5, 59])
@pytest.mark.parametrize("large", [1, 4])
def test_a_small_request_waits_for_steps_of_large_ones_and_not_for_all_of_them(
    program: OpenProgram, large: int, before: int
) -> None:
    turns = Turns(program)
    for number in range(large):
        turns.add(
            f"large {number}", *(picture(label, number, cfg_scale=1 + number / 8, steps=60) for label in range(4))
        )
    turns.run(before)
    turns.add("small", picture(0, 0, steps=2))
    turns.finish()
    # Two steps and the pictures, each behind one turn of every large one.
    assert turns.done["small"] - before <= 3 * (large + 1)
    assert len(turns.done) == large + 1


def test_large_requests_share_the_time(program: OpenProgram) -> None:
    turns = Turns(program)
    for number in range(3):
        turns.add(str(number), picture(0, 0, cfg_scale=1 + number / 8, steps=20))
    turns.finish()
    assert max(turns.done.values()) - min(turns.done.values()) <= 3


def test_requests_of_the_same_settings_wait_to_share_a_batch(program: OpenProgram) -> None:
    turns = Turns(program)
    turns.add("first", picture(0, 0, steps=4))
    turns.run(1)
    for name in "abcd":
        turns.add(name, picture(0, 0, steps=4))
    turns.finish()
    assert len({turns.done[name] for name in "abcd"}) == 1
    assert turns.done["a"] <= 12


def test_few_batches_are_in_progress(program: OpenProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []
    own = OpenProgram.run
    monkeypatch.setattr(
        OpenProgram, "run", lambda self, *rest: begun.append(self.program.values["cfg_scale"]) or own(self, *rest)
    )
    turns = Turns(program, most=2)
    for number in range(5):
        turns.add(str(number), picture(0, 0, cfg_scale=1 + number / 8, steps=3))
    assert turns.service.full is False
    turns.run(4)
    assert begun == [1.0, 1.125]
    turns.finish()
    assert sorted(turns.done) == list("01234")


@pytest.mark.parametrize("error", [RuntimeError("driver\nlost"), MemoryError(), KeyError("x")])
def test_whatever_fails_ends_its_own_requests_only(
    program: OpenProgram, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    own = OpenProgram.run

    def failing(self: OpenProgram, request: Request, draws: Draws) -> object:
        if self.program.values["cfg_scale"] == 1.0:
            raise error
        return own(self, request, draws)

    monkeypatch.setattr(OpenProgram, "run", failing)
    wanted = [
        [picture(0, 0, cfg_scale=1.0, steps=2), picture(0, 0, cfg_scale=2.0, steps=2)],
        [picture(0, 0, cfg_scale=2.0, steps=2)],
    ]
    broken, fine = make_pictures(program, wanted, 4)
    assert type(error).__name__ in str(broken)
    assert isinstance(fine, np.ndarray)


def test_a_worker_answers_everything_before_it_stops(program: OpenProgram) -> None:
    answers: dict[int, object] = {}
    worker = Worker(Service(program, 2, most=2))
    for number in range(12):
        one = picture(number % 10, number, steps=2 + number % 3)
        worker.add([([one], lambda answer, number=number: answers.update({number: answer}))])
    worker.stop()
    assert sorted(answers) == list(range(12))
    assert all(isinstance(answer, np.ndarray) for answer in answers.values())
