"""Schedules against the numbers of the official code."""

from __future__ import annotations

import numpy as np
import pytest

from dexport.errors import UsageError
from dexport.runtime.samplers.ddpm import p_mean_variance
from dexport.runtime.schedule import Schedule, linear_betas, space_timesteps, sqrt_linear_betas
from tests.golden import assert_golden
from tests.runtime.sampler_golden import sampler_golden, schedule


@pytest.mark.golden
def test_respacing_is_the_official_one() -> None:
    _, outputs = sampler_golden()
    respaced = schedule()
    np.testing.assert_array_equal(respaced.timestep_map, outputs["timestep_map"])
    np.testing.assert_allclose(respaced.betas, outputs["betas"], rtol=1e-13)
    np.testing.assert_allclose(respaced.alphas_cumprod, outputs["alphas_cumprod"], rtol=1e-13)


@pytest.mark.golden
def test_full_schedule_is_the_official_one() -> None:
    _, outputs = sampler_golden()
    full = Schedule.of_betas(linear_betas())
    np.testing.assert_allclose(full.alphas_cumprod, outputs["full_alphas_cumprod"], rtol=1e-13)
    np.testing.assert_array_equal(full.respaced(1000).timestep_map, np.arange(1000))
    np.testing.assert_allclose(full.respaced(1000).betas, full.betas, rtol=1e-9)


@pytest.mark.golden
def test_p_mean_variance_is_the_official_one() -> None:
    inputs, outputs = sampler_golden()
    posterior = p_mean_variance(schedule(), inputs["model_output"], inputs["x"], inputs["t"])
    for name in ("mean", "log_variance", "pred_xstart"):
        assert_golden(getattr(posterior, name), outputs[name], 1e-6)
        assert getattr(posterior, name).dtype == np.float32


def test_model_timesteps_are_the_original_ones() -> None:
    inputs, outputs = sampler_golden()
    np.testing.assert_array_equal(schedule().timestep_map[inputs["t"]], outputs["model_t"])


def test_without_variance_channels_the_variance_is_fixed_large() -> None:
    inputs, _ = sampler_golden()
    respaced = schedule()
    posterior = p_mean_variance(respaced, inputs["model_output"][:, :4], inputs["x"], inputs["t"])
    np.testing.assert_allclose(posterior.log_variance[1], np.log(respaced.betas[19]), rtol=1e-6)
    np.testing.assert_allclose(posterior.log_variance[0], np.log(respaced.posterior_variance[1]), rtol=1e-6)


def test_learned_range_ends_at_the_posterior_and_at_beta() -> None:
    respaced, t = schedule(), np.array([5])
    low = respaced.learned_range_log_variance(np.full((1, 4, 2, 2), -1.0), t)
    high = respaced.learned_range_log_variance(np.full((1, 4, 2, 2), 1.0), t)
    np.testing.assert_allclose(np.exp(low), respaced.posterior_variance[5])
    np.testing.assert_allclose(np.exp(high), respaced.betas[5])


def test_stable_diffusion_betas() -> None:
    betas = sqrt_linear_betas()
    np.testing.assert_allclose(betas[[0, -1]], [0.00085, 0.012])
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), np.diff(np.sqrt(betas))[0])


@pytest.mark.parametrize("steps", [2, 3, 10, 50, 100, 250, 999, 1000])
def test_spaced_timesteps_are_distinct_and_keep_both_ends(steps: int) -> None:
    kept = space_timesteps(1000, steps)
    assert len(kept) == steps
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, 999)


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_a_bad_number_of_steps_is_refused_with_the_range(steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} steps") as error:
        Schedule.of_betas(linear_betas()).respaced(steps)
    assert error.value.hint == "choose between 2 and 1000 steps"


def test_bad_betas_are_refused() -> None:
    with pytest.raises(UsageError, match="betas"):
        Schedule.of_betas([0.1, 0.0])


@pytest.mark.golden
def test_q_sample_is_the_official_one() -> None:
    inputs, outputs = sampler_golden()
    full, t = Schedule.of_betas(linear_betas()), np.full(4, inputs["q_t"])
    assert_golden(full.q_sample(inputs["x"], t, inputs["q_noise"]), outputs["q_sample"], 1e-6)
