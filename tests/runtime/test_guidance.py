"""Guidance on the host against the same rules in torch, and against the golden."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dexport.contract import LABEL, PREDICTION, STATE, TIME, TIMESTEPS, Clock, Graph, GuidanceRule, Port
from dexport.errors import UsageError
from dexport.exporter.recipes import all_recipes
from dexport.exporter.recipes.diffusion import guidance_rule
from dexport.graphs.guidance import Guided
from dexport.runtime.draws import Replay
from dexport.runtime.guidance import RULES, Rule, describe_rule, feed_of, find_rule, fused, guided, in_unit, unguided
from dexport.runtime.samplers import DDIM, DDPM, Sampler, last
from tests.golden import TOLERANCE_LOOP, assert_golden
from tests.runtime.sampler_golden import as_session, golden_session, sampler_golden, schedule

NULL = 10
X = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
T = np.array([0.0, 421.0, 999.0], dtype=np.float32)
Y = [1, 0, 9]


class Labelled(torch.nn.Module):
    """A stand-in for a denoiser: depends on x, t and y, twice the channels."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift = (t / 1000 + torch.sin(y.float()))[:, None, None, None]
        return torch.cat([torch.tanh(x + shift), x * shift], dim=1)


SESSION = as_session(Labelled())


ALL_CHANNELS, POWER_COSINE = GuidanceRule(), GuidanceRule(channels=3, power=4.0)


@pytest.mark.parametrize("facts", [*RULES.values(), POWER_COSINE, GuidanceRule(power=2.5)], ids=describe_rule)
@pytest.mark.parametrize("cfg_scale", [1.5, 4.4])
def test_the_host_and_the_fused_graph_agree(facts: GuidanceRule, cfg_scale: float) -> None:
    rule = Rule.of(facts, TIMESTEPS)
    graph = as_session(Guided(Labelled(), NULL, rule.channels, rule.power, (0.0, rule.steps)))
    on_host = guided(SESSION, Y, cfg_scale, NULL, rule)(X, T)
    in_graph = fused(graph, Y, cfg_scale)(X, T)
    assert on_host.dtype == np.float32
    assert_golden(on_host, in_graph)


def test_all_channels_are_guided() -> None:
    cond, null = unguided(SESSION, Y)(X, T), unguided(SESSION, [NULL] * 3)(X, T)
    out = guided(SESSION, Y, 1.4, NULL, Rule.of(ALL_CHANNELS, None))(X, T)
    np.testing.assert_allclose(out, cond + 0.4 * (cond - null), atol=1e-6)


def test_the_first_three_channels_are_guided_and_no_other() -> None:
    cond = unguided(SESSION, Y)(X, T)
    out = guided(SESSION, Y, 3.0, NULL)(X, T)
    np.testing.assert_array_equal(out[:, 3:], cond[:, 3:])
    assert (np.abs(out[:, :3] - cond[:, :3]).max(axis=(0, 2, 3)) > 1e-3).all()


def test_all_channels_by_a_power_of_time() -> None:
    cond, null = unguided(SESSION, Y)(X, T), unguided(SESSION, [NULL] * 3)(X, T)
    strength = (2.8 - 1) * (1 - np.cos(np.pi * (1 - T / 1000) ** 1.5)) / 2 + 1
    out = guided(SESSION, Y, 2.8, NULL, Rule.of(GuidanceRule(power=1.5), TIMESTEPS))(X, T)
    np.testing.assert_allclose(out, null + strength.reshape(-1, 1, 1, 1) * (cond - null), atol=1e-6)


def graph(*inputs: str, clock: Clock | None = None) -> Graph:
    """A denoiser's graph whose inputs have the usual names, or others."""
    roles = {"x": STATE, "y": LABEL}
    kinds = {"x": ("float32", ("B", 4, 8, 8)), "y": ("int64", ("B",))}
    return Graph(
        tuple(
            Port(
                name,
                *kinds.get(name, ("float32", ("B",))),
                role=roles.get(name, TIME),
                clock=clock if name not in roles else None,
            )
            for name in inputs
        ),
        (Port("out", "float32", ("B", 4, 8, 8), PREDICTION),),
    )


@pytest.mark.parametrize("inputs", [("x", "t", "y"), ("x", "log_snr", "y"), ("x", "log_snr"), ("x", "when")])
def test_a_graph_is_fed_what_it_takes(inputs: tuple[str, ...]) -> None:
    assert tuple(feed_of(graph(*inputs))(X, T, np.array(Y))) == inputs


@pytest.mark.parametrize("inputs", [("x",), ("t",), ("x", "y")])
def test_a_graph_without_a_state_or_a_time_is_fed_nothing(inputs: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="samplers feed a state and a time"):
        feed_of(graph(*inputs))


def test_a_time_is_in_the_unit_of_the_graph() -> None:
    log_snr = feed_of(graph("x", "log_snr", clock=Clock(-4.0, 4.0)), TIMESTEPS)(X, T, np.array(Y))["log_snr"]
    assert log_snr.dtype == np.float32
    np.testing.assert_array_equal(log_snr, T / np.float32(1000) * np.float32(8) - np.float32(4))
    np.testing.assert_allclose(in_unit(log_snr, Clock(-4.0, 4.0), TIMESTEPS), T, rtol=1e-6, atol=1e-4)
    for unit in (None, TIMESTEPS):
        assert in_unit(T, TIMESTEPS, unit) is T


def test_power_cosine_grows_from_one_to_the_scale() -> None:
    t = np.array([1000, 750, 500, 0], dtype=np.float32)
    scales = Rule.of(POWER_COSINE, TIMESTEPS).scale(t, 4.4).ravel()
    assert scales[0] == 1
    assert (np.diff(scales) > 0).all()
    np.testing.assert_allclose(scales[-1], 4.4, rtol=1e-6)


def test_scale_one_does_not_double_the_batch() -> None:
    batches: list[int] = []

    def session(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        batches.append(len(inputs["x"]))
        return SESSION(**inputs)

    np.testing.assert_array_equal(guided(session, Y, 1.0, NULL)(X, T), unguided(SESSION, Y)(X, T))
    guided(session, Y, 1.5, NULL)(X, T)
    assert batches == [3, 6]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("sampler", "name"), [(DDPM(schedule()), "p_sample_loop"), (DDIM(schedule()), "ddim_sample_loop")]
)
def test_the_guided_loop_is_the_conditional_half_of_the_official_one(sampler: Sampler, name: str) -> None:
    inputs, outputs = sampler_golden()
    denoiser = guided(golden_session(), inputs["loop_y"][:2], float(inputs["cfg_scale"]), NULL)
    x = last(sampler.run(denoiser, inputs["loop_z"][:2], Replay(inputs["loop_noise"][:, :2])))
    assert_golden(x, outputs[name][:2], TOLERANCE_LOOP)


def test_every_rule_of_a_recipe_is_known() -> None:
    for recipe in all_recipes().values():
        assert (guidance_rule(recipe, recipe.config) is None) == (recipe.guidance is None)
    with pytest.raises(UsageError, match="no guidance rule 'magic'") as error:
        find_rule("magic")
    assert "first three channels" in error.value.hint


def test_guidance_without_a_null_class_is_refused() -> None:
    with pytest.raises(UsageError, match="scale 4 needs a null class") as error:
        guided(SESSION, Y, 4.0, None)
    assert "--cfg 1" in error.value.hint
    guided(SESSION, Y, 1.0, None)(X, T)


@pytest.mark.parametrize("label", [-1, NULL, 207])
def test_unknown_classes_are_refused(label: int) -> None:
    with pytest.raises(UsageError, match=f"no class {label}: the model has 10") as error:
        guided(SESSION, [0, label], 1.5, NULL)
    assert error.value.hint == "choose from 0 to 9"


@pytest.mark.parametrize("cfg_scale", [0.5, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused(cfg_scale: float) -> None:
    with pytest.raises(UsageError, match="guidance scale"):
        guided(SESSION, Y, cfg_scale, NULL)
    with pytest.raises(UsageError, match="guidance scale"):
        fused(SESSION, Y, cfg_scale)


def test_inputs_have_the_names_and_types_of_the_graph() -> None:
    seen: dict[str, np.ndarray] = {}

    def session(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        seen.update(inputs)
        return {"out": inputs["x"]}

    fused(session, Y, 2.0)(X.astype(np.float64), T)
    assert {name: value.dtype.name for name, value in seen.items()} == {
        "x": "float32",
        "t": "float32",
        "y": "int64",
        "cfg_scale": "float32",
    }
    assert seen["cfg_scale"].shape == ()


@pytest.mark.parametrize("make", [lambda y: unguided(SESSION, y), lambda y: fused(SESSION, y, 1.5)])
def test_negative_classes_never_wrap_around(make: Callable[[list[int]], object]) -> None:
    with pytest.raises(UsageError, match="no class -1"):
        make([0, -1])
