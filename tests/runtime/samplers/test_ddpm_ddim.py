"""DDPM and DDIM against the official loops with the recorded noise."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from dexport.errors import UsageError
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.samplers import DDIM, DDPM, Sampler, last, sample
from tests.golden import TOLERANCE_LOOP, assert_golden, relative_error
from tests.graphs.planted import Plant, other_gelu, other_order_of_chunks
from tests.runtime.sampler_golden import both_halves, sampler_golden, schedule, torch_states

LOOPS = [(DDPM(schedule()), "p_sample_loop"), (DDIM(schedule()), "ddim_sample_loop")]


@pytest.mark.golden
@pytest.mark.parametrize(("sampler", "name"), LOOPS)
def test_full_loop_is_the_official_one(sampler: Sampler, name: str) -> None:
    inputs, outputs = sampler_golden()
    denoiser = both_halves(inputs["loop_y"], float(inputs["cfg_scale"]))
    states = list(sampler.run(denoiser, inputs["loop_z"], Replay(inputs["loop_noise"])))
    assert_golden(states[-1].x, outputs[name], TOLERANCE_LOOP)
    assert [step.t for step in states] == [float(t) for t in outputs["timestep_map"][::-1]]
    assert states[-1].x.dtype == np.float32


@pytest.mark.parametrize("plant", [other_gelu, other_order_of_chunks])
@pytest.mark.parametrize(("sampler", "name"), LOOPS)
def test_a_fault_of_the_network_ends_elsewhere(
    sampler: Sampler, name: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = sampler_golden()
    plant(nn.Identity(), monkeypatch)
    denoiser = both_halves(inputs["loop_y"], float(inputs["cfg_scale"]))
    end = last(sampler.run(denoiser, inputs["loop_z"], Replay(inputs["loop_noise"])))
    assert relative_error(end, outputs[name]) > 3 * TOLERANCE_LOOP


@pytest.mark.golden
@pytest.mark.parametrize(("sampler", "name"), LOOPS)
def test_every_step_from_the_official_state_is_the_official_one(sampler: Sampler, name: str) -> None:
    inputs, outputs = sampler_golden()
    official = list(torch_states(deterministic=isinstance(sampler, DDIM)))
    assert_golden(official[-1], outputs[name], TOLERANCE_LOOP)
    guided = both_halves(inputs["loop_y"], float(inputs["cfg_scale"]))
    before = iter(official)

    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x[:] = next(before)
        return guided(x, t)

    for step, after in zip(
        sampler.run(denoiser, inputs["loop_z"].copy(), Replay(inputs["loop_noise"])), official[1:], strict=True
    ):
        assert_golden(step.x, after, TOLERANCE_LOOP)


@pytest.mark.golden
def test_ddim_step_is_the_official_one() -> None:
    inputs, outputs = sampler_golden()
    respaced, ddim = schedule(), DDIM(schedule())
    eps = inputs["model_output"][:, :4]
    pred_xstart = respaced.predict_xstart_from_eps(inputs["x"], inputs["t"], eps)
    for row, t in enumerate(inputs["t"]):
        signal, remaining, sigma = ddim.coefficients(t)
        assert sigma == 0
        x = signal * pred_xstart[row] + remaining * eps[row]
        assert_golden(x, outputs["ddim_sample"][row], 1e-6)


def test_eta_one_has_the_posterior_variance() -> None:
    ddim = DDIM(schedule(), eta=1.0)
    sigmas = np.array([ddim.coefficients(t)[2] for t in range(20)])
    np.testing.assert_allclose(sigmas**2, schedule().posterior_variance, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "draws"), [(DDPM(schedule()), 20), (DDIM(schedule()), 1), (DDIM(schedule(), 0.5), 20)]
)
def test_a_replayed_run_is_bit_exact(sampler: Sampler, draws: int) -> None:
    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.tanh(x) * (1 + t[:, None, None, None] / 1000)

    noise = Draws(3, images=[0, 1], record=True)
    first = sample(sampler, denoiser, noise, (2, 4, 8, 8))
    assert len(noise.draws) == draws
    np.testing.assert_array_equal(sample(sampler, denoiser, Replay(noise.draws), (2, 4, 8, 8)), first)
    np.testing.assert_array_equal(sample(sampler, denoiser, Draws(3, images=[0, 1]), (2, 4, 8, 8)), first)
    np.testing.assert_array_equal(sample(sampler, denoiser, Draws(3, images=[1]), (1, 4, 8, 8)), first[1:])
    assert not np.array_equal(sample(sampler, denoiser, Draws(4, images=[0, 1]), (2, 4, 8, 8)), first)


def test_ddim_with_the_true_score_of_gaussian_data_is_exact_for_a_point() -> None:
    """Data at one point: eps = (x - sqrt(abar) * point) / sqrt(1 - abar), and the loop ends at the point."""
    respaced, point = schedule(), 0.7
    alphas = dict(zip(respaced.timestep_map, respaced.alphas_cumprod, strict=True))

    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        alpha = alphas[int(t[0])]
        return (x - np.float32(np.sqrt(alpha) * point)) / np.float32(np.sqrt(1 - alpha))

    x = sample(DDIM(respaced), denoiser, Draws(0, images=[0]), (1, 1, 2, 2))
    np.testing.assert_allclose(x, point, atol=1e-5)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(UsageError, match="eta"):
        DDIM(schedule(), eta)


def test_a_denoiser_with_foreign_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="3 channels for a state of 4"):
        sample(DDIM(schedule()), lambda x, _t: x[:, :3], Draws(0, images=[0]), (1, 4, 2, 2))


def test_no_steps_have_no_last_state() -> None:
    with pytest.raises(UsageError, match="no step"):
        last([])
