"""T-Stitch: every choice of the official code, the clamp, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.samplers import DDIM, EDM, SAMPLERS, FlowEuler, Sampler, make_sampler, sample
from dexport.runtime.stitch import Stitch, choose
from tests.runtime.sampler_golden import sampler_golden, schedule


def executed_timesteps() -> list[float]:
    return [float(t) for t in schedule().timestep_map[::-1]]


def test_two_denoisers_are_chosen_as_officially() -> None:
    inputs, outputs = sampler_golden()
    chosen = [[choose(t, [ratio, 1 - ratio]) for t in executed_timesteps()] for ratio in inputs["tstitch_ratios"]]
    np.testing.assert_array_equal(chosen, outputs["tstitch_index"])


def test_three_denoisers_are_chosen_as_officially() -> None:
    _, outputs = sampler_golden()
    chosen = [choose(t, [0.3, 0.4, 0.3]) for t in executed_timesteps()]
    np.testing.assert_array_equal(chosen, outputs["tstitch3_index"])


def official_choice(t: int, fractions: list[float]) -> int:
    progress = 1 - t / 1000
    milestones = torch.cumsum(torch.tensor(fractions), dim=0)
    return next((index for index, milestone in enumerate(milestones) if not progress > milestone), len(fractions) - 1)


@given(st.lists(st.integers(1, 100), min_size=3, max_size=12), st.integers(0, 999))
def test_the_rule_is_the_one_that_torch_computes(weights: list[int], t: int) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    assert choose(t, fractions) == official_choice(t, fractions)


@pytest.mark.parametrize("fractions", [[0.3, 0.4, 0.3], [0.4, 0.2, 0.4], [0.35, 0.45, 0.2], [0.1] * 10])
def test_the_rule_is_the_one_that_torch_computes_at_every_timestep(fractions: list[float]) -> None:
    for t in range(1000):
        assert choose(t, fractions) == official_choice(t, fractions), t


def test_rounding_that_leaves_none_takes_the_last() -> None:
    fractions = [0.35, 0.45, 0.2]
    assert np.cumsum(np.array(fractions, dtype=np.float32), dtype=np.float32)[-1] < 1
    assert choose(0, fractions) == 2


def test_a_sampler_runs_the_chosen_denoisers() -> None:
    called = {"small": 0, "large": 0}

    def counting(name: str):
        def denoiser(x: np.ndarray, _t: np.ndarray) -> np.ndarray:
            called[name] += 1
            return x

        return denoiser

    stitched = Stitch([counting("small"), counting("large")], [0.4, 0.6])
    sample(DDIM(schedule()), stitched, Draws(0, images=[0]), (1, 4, 2, 2))
    assert called == {"small": 8, "large": 12}


@pytest.mark.parametrize(
    ("count", "fractions", "message"),
    [
        (1, [1.0], "1 denoisers"),
        (3, [0.5, 0.5], "3 denoisers and 2 fractions"),
        (2, [0.5, 0.6], "0.5, 0.6 do not share"),
        (2, [-0.5, 1.5], "do not share"),
        (2, [float("nan"), 1.0], "do not share"),
    ],
)
def test_bad_stitches_are_refused(count: int, fractions: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Stitch([lambda x, _t: x] * count, fractions)
    assert error.value.hint


# Samplers whose time is not that of the timesteps


SHARES = [0.0, 0.1, 0.25, 0.4, 0.5, 0.7, 1.0]


def evaluations(sampler: Sampler, fractions: list[float]) -> list[int]:
    """How often each denoiser runs along a trajectory."""
    counts = [0] * len(fractions)

    def counting(index: int):
        def denoiser(x: np.ndarray, _t: np.ndarray) -> np.ndarray:
            counts[index] += 1
            return np.zeros_like(x)

        return denoiser

    stitched = Stitch([*map(counting, range(len(fractions)))], fractions, sampler.remaining)
    sample(sampler, stitched, Draws(0, images=[0]), (1, 4, 2, 2))
    return counts


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("steps", [1, 4, 10, 20, 250])
@pytest.mark.parametrize(
    "make",
    [
        FlowEuler,
        lambda steps: FlowEuler(steps, shift=3.0),
        lambda steps: FlowEuler(steps, time_scale=1000.0),
        lambda steps: make_sampler("dpm-solver", steps),
    ],
    ids=["flow", "shifted flow", "flow in timesteps", "dpm-solver"],
)
def test_a_share_is_one_of_the_evaluations(make: Callable[[int], Sampler], steps: int, share: float) -> None:
    first = int(share * steps + 1e-9)
    assert evaluations(make(steps), [share, 1 - share]) == [first, steps - first]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("steps", [2, 10, 18, 40])
def test_heun_s_second_evaluation_is_of_the_denoiser_of_its_noise_level(steps: int, share: float) -> None:
    """Of 2 * steps - 1 evaluations, one at sigma_max and two at each level below it."""
    levels = int(share * steps + 1e-9)
    first = max(0, 2 * levels - 1)
    assert evaluations(EDM(steps), [share, 1 - share]) == [first, 2 * steps - 1 - first]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_several_denoisers_run_one_after_the_other(name: str) -> None:
    counts = evaluations(make_sampler(name, 20), [0.25, 0.5, 0.25])
    assert all(abs(count / sum(counts) - share) < 0.06 for count, share in zip(counts, [0.25, 0.5, 0.25], strict=True))


def evaluated_times(sampler: Sampler) -> list[float]:
    """Every time at which a sampler evaluates its denoiser, once, in the order of the first evaluations."""
    times: dict[float, None] = {}

    def record(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        times[float(t[0])] = None
        return np.zeros_like(x)

    sample(sampler, record, Draws(0, images=[0]), (1, 1, 1, 1))
    return list(times)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_what_remains_of_a_trajectory_falls_from_below_1_to_0(name: str) -> None:
    sampler = make_sampler(name, 20)
    left = [sampler.remaining(float(np.float32(t))) for t in evaluated_times(sampler)]
    assert left == sorted(left, reverse=True)
    assert (0.9 < left[0] < 1, left[-1]) == (True, 0)
