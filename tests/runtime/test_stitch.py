"""T-Stitch: every choice of the official code, the clamp, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dexport.errors import UsageError
from dexport.runtime.noise import Noise
from dexport.runtime.samplers import DDIM, sample
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
    sample(DDIM(schedule()), stitched, Noise(0, images=[0]), (1, 4, 2, 2))
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
