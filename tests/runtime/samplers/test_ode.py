"""DPM-Solver, EDM and flow matching on Gaussian data, whose probability flow has a closed form.

With data N(MEAN, STD^2) per pixel the optimal denoiser is linear in x, and the flow carries x along its quantile: the
standardised state never changes. So the error of a solver is known exactly, and halving the steps shows its order.
"""

from __future__ import annotations

import numpy as np
import pytest

from dexport.errors import UsageError
from dexport.exporter.recipes import all_recipes
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.samplers import EDM, SAMPLERS, DPMSolver, FlowEuler, Sampler, last, make_sampler, sample
from dexport.runtime.samplers.dpm_solver import ContinuousSchedule
from dexport.runtime.schedule import Schedule, sqrt_linear_betas
from tests.golden import TOLERANCE_LOOP, assert_golden, load_golden

MEAN, STD = 0.4, 0.6
QUANTILES = np.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
SILENT = Replay([])
SCHEDULE = Schedule.of_betas(sqrt_linear_betas())
CONTINUOUS = ContinuousSchedule(SCHEDULE)


def optimal_image(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x_0 | x] where x = alpha * x_0 + sigma * noise."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def state(alpha: float, sigma: float) -> np.ndarray:
    """The exact solution: every pixel stays at its quantile."""
    return alpha * MEAN + np.sqrt(alpha**2 * STD**2 + sigma**2) * QUANTILES


def vp_epsilon(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    time = float(t[0]) / SCHEDULE.steps
    alpha, sigma = CONTINUOUS.alpha(time), CONTINUOUS.sigma(time)
    return (x - alpha * optimal_image(x, alpha, sigma)) / sigma


def flow_velocity(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    time = float(t[0])
    if time == 0:
        return x
    return (x - optimal_image(x, 1 - time, time)) / time


def dpm_error(steps: int, end: float | None = None) -> float:
    solver = DPMSolver(SCHEDULE, steps, end)
    end = solver.times()[-1]
    out = last(solver.run(vp_epsilon, state(CONTINUOUS.alpha(1.0), CONTINUOUS.sigma(1.0)), SILENT))
    return float(np.abs(out - state(CONTINUOUS.alpha(end), CONTINUOUS.sigma(end))).max())


def edm_error(steps: int) -> float:
    solver = EDM(steps, sigma_min=0.5, sigma_max=5.0)
    steps_taken = list(solver.run(lambda x, t: optimal_image(x, 1.0, float(t[0])), state(1.0, 5.0), SILENT))
    return float(np.abs(steps_taken[-2].x - state(1.0, 0.5)).max())


def flow_error(steps: int, shift: float = 1.0) -> float:
    out = last(FlowEuler(steps, shift).run(flow_velocity, state(0.0, 1.0), SILENT))
    return float(np.abs(out - state(1.0, 0.0)).max())


def observed_order(coarse: float, fine: float) -> float:
    return float(np.log2(coarse / fine))


def test_dpm_solver_converges_with_order_three() -> None:
    """steps % 3 == 2 ends on a step of order 2, which does not lower the global order."""
    assert observed_order(dpm_error(47, end=0.3), dpm_error(95, end=0.3)) == pytest.approx(3, abs=0.35)
    assert dpm_error(95, end=0.3) < 1e-5


def test_dpm_solver_ends_at_the_data_with_the_default_grid() -> None:
    assert dpm_error(250) < 2e-3
    assert dpm_error(250) < dpm_error(50)


def test_edm_converges_with_order_two() -> None:
    assert observed_order(edm_error(20), edm_error(40)) == pytest.approx(2, abs=0.25)


def test_edm_ends_at_the_data() -> None:
    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return optimal_image(x, 1.0, float(t[0]))

    for steps, atol in ((40, 1.2e-2), (160, 1e-3)):
        out = last(EDM(steps).run(denoiser, state(1.0, 80.0), SILENT))
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, state(1.0, 0.0), atol=atol)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_converges_with_order_one(shift: float) -> None:
    assert observed_order(flow_error(200, shift), flow_error(400, shift)) == pytest.approx(1, abs=0.1)
    assert flow_error(400, shift) < 0.02


@pytest.mark.parametrize("steps", [*range(1, 12), 50, 250, 1000])
def test_dpm_solver_uses_exactly_the_evaluations_asked_for(steps: int) -> None:
    calls: list[float] = []

    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        calls.append(float(t[0]))
        return vp_epsilon(x, t)

    solver = DPMSolver(SCHEDULE, steps)
    last(solver.run(denoiser, state(0.0, 1.0), SILENT))
    assert len(calls) == sum(solver.orders()) == steps
    np.testing.assert_allclose(calls, solver.times()[:-1] * 1000, rtol=1e-6)


def test_dpm_solver_orders_are_those_of_fast() -> None:
    assert DPMSolver(SCHEDULE, 9).orders() == [3, 3, 2, 1]
    assert DPMSolver(SCHEDULE, 10).orders() == [3, 3, 3, 1]
    assert DPMSolver(SCHEDULE, 11).orders() == [3, 3, 3, 2]
    assert DPMSolver(SCHEDULE, 250).orders() == [3] * 83 + [1]


def test_continuous_schedule_passes_through_the_discrete_one() -> None:
    for index in (0, 499, 999):
        time = (index + 1) / 1000
        assert CONTINUOUS.alpha(time) ** 2 == pytest.approx(SCHEDULE.alphas_cumprod[index], rel=1e-12)
        assert CONTINUOUS.alpha(time) ** 2 + CONTINUOUS.sigma(time) ** 2 == pytest.approx(1)
    for time in (0.001, 0.0123, 0.5, 0.9999):
        assert CONTINUOUS.inverse_lambda(CONTINUOUS.lambda_(time)) == pytest.approx(time, rel=1e-9)


def test_edm_sigmas() -> None:
    sigmas = EDM(18).sigmas()
    assert len(sigmas) == 19
    np.testing.assert_allclose(sigmas[[0, 17, 18]], [80, 0.002, 0], rtol=1e-12)
    np.testing.assert_allclose(np.diff(sigmas[:-1] ** (1 / 7), 2), 0, atol=1e-12)


def test_edm_starts_at_sigma_max_and_evaluates_twice_per_step_but_the_last() -> None:
    calls: list[float] = []

    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        calls.append(float(t[0]))
        return optimal_image(x, 1.0, float(t[0]))

    start = EDM(18).start(Draws(0, images=[0]), (1, 3, 32, 32))
    assert start.std() == pytest.approx(80, rel=0.05)
    sample(EDM(18), denoiser, Draws(0, images=[0]), (1, 3, 8, 8))
    assert len(calls) == 35


def test_flow_receives_scaled_time_and_predicts_the_image() -> None:
    image = np.full((1, 1, 2, 2), 0.3, dtype=np.float32)
    start = np.full((1, 1, 2, 2), -1.0, dtype=np.float32)
    steps = list(FlowEuler(4, time_scale=1000.0).run(lambda _x, _t: start - image, start, SILENT))
    assert [step.t for step in steps] == [1000, 750, 500, 250]
    for step in steps:
        np.testing.assert_allclose(step.pred_xstart, image, atol=1e-6)
    np.testing.assert_allclose(steps[-1].x, image, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_named_sampler_keeps_shape_and_yields_its_states(name: str) -> None:
    sampler: Sampler = make_sampler(name, 5)
    noise = Draws(0, images=[0, 1])
    steps = list(sampler.run(lambda x, _t: 0.1 * x, sampler.start(noise, (2, 4, 8, 8)), noise))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert all(step.x.shape == step.pred_xstart.shape == (2, 4, 8, 8) for step in steps)
    assert [step.t for step in steps] == sorted((step.t for step in steps), reverse=True)
    assert np.isfinite(steps[-1].x).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_too_few_steps_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(UsageError) as error:
        make_sampler(name, 0)
    assert "choose" in error.value.hint


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver"])
def test_more_steps_than_the_schedule_has_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="the schedule has 1000") as error:
        make_sampler(name, 1001)
    assert "1000" in error.value.hint


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="no sampler 'plms'"):
        make_sampler("plms", 50)
    with pytest.raises(UsageError, match="sigma"):
        EDM(18, sigma_min=1.0, sigma_max=0.5)
    with pytest.raises(UsageError, match="flow shift"):
        FlowEuler(10, shift=0.0)
    with pytest.raises(UsageError, match="end time"):
        DPMSolver(SCHEDULE, 10, end=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("steps", [9, 10, 11, 50, 250])
def test_dpm_solver_is_the_official_one(steps: int) -> None:
    """The golden's note gives the function that stands in for a network."""
    golden = load_golden("dpm-solver")

    def denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.tanh(0.7 * x + np.sin(t / 500)[:, None, None, None])

    out = last(DPMSolver(SCHEDULE, steps).run(denoiser, golden.inputs["x"].numpy(), SILENT))
    assert out.dtype == np.float32
    assert_golden(out, golden.outputs[f"steps_{steps}"].numpy(), TOLERANCE_LOOP)


def test_every_recipe_names_a_sampler_that_runs_its_steps() -> None:
    for recipe in all_recipes().values():
        if recipe.sampling:
            make_sampler(recipe.sampling.sampler, recipe.sampling.steps)
