"""The program of masked generators, with a network that answers what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dexport.contract import BATCH, DROP, LABEL, LATENT, LOGITS, PICTURE, STATE, Condition, Decoding, Graph, Port
from dexport.errors import GateError, UsageError
from dexport.runtime.calls import rehearse
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.programs import program_from_json
from dexport.runtime.programs.masked import Masked
from dexport.runtime.programs.masked_orders import probabilities
from dexport.runtime.programs.masked_schedules import SHARES, confidence_counts, halton_counts, halton_order, ramp
from dexport.runtime.programs.program import IDS, PICTURES, Request, Step
from tests.golden import load_golden

CODES, SIDE, CLASSES = 6, 4, 3
PLACES = SIDE * SIDE
PROGRAM = Masked(
    condition=Condition("class", CLASSES, null=CLASSES),
    codes=CODES,
    mask=CODES,
    order="halton",
    steps=5,
    cfg_scale=1.0,
)
GRAPH = Graph(
    (
        Port("codes", "int64", (BATCH, SIDE, SIDE), STATE, (0, CODES)),
        Port("labels", "int64", (BATCH,), LABEL, (0, CLASSES)),
        Port("drop_label", "bool", (BATCH,), DROP),
    ),
    (Port("logits", "float32", (BATCH, PLACES, CODES + 1), LOGITS),),
)
Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]
TABLE = np.random.default_rng(0).standard_normal((CODES + 1, PLACES, CODES + 1)).astype(np.float32)


def by_table(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What is known at a place, the class and the mean of all ids move the logits, and the mask's is never drawn."""
    logits = (
        TABLE[labels] + 0.1 * codes.reshape(len(codes), PLACES, 1) * TABLE[1] + codes.mean(axis=(1, 2))[:, None, None]
    )
    logits[..., CODES] = -1e4
    return logits.astype(np.float32)


class Stub:
    """A transformer.

    Attributes:
        made: the inputs of every call.
    """

    graphs: Mapping[str, Graph] = {"model": GRAPH}

    def __init__(self, logits: Logits = by_table) -> None:
        self.logits, self.made = logits, list[dict[str, np.ndarray]]()

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        assert graph == "model"
        assert {name: array.dtype.name for name, array in inputs.items()} == {p.name: p.dtype for p in GRAPH.inputs}
        self.made.append(inputs)
        dropped = np.where(inputs["drop_label"], CLASSES, inputs["labels"])
        return {"logits": self.logits(inputs["codes"], dropped)}


def steps_of(program: Masked, labels: tuple[int, ...] = (0, 2), draws: Draws | None = None, **roles: Any) -> list[Step]:
    calls = {"transformer": [Stub()], **roles}
    return list(program.run(calls, Request(len(labels), labels), draws or Draws(0, images=range(len(labels)))))


# Schedules


@pytest.mark.golden
def test_halton_order_is_the_official_one() -> None:
    places = load_golden("halton-halton-loop").outputs["halton_order"].numpy()
    np.testing.assert_array_equal(halton_order(8, 8), places[:, 0] * 8 + places[:, 1])


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 16), (70, 60)])
def test_halton_order_meets_every_place_once(size: tuple[int, int]) -> None:
    """4200 places are more than the official 10,000 points meet."""
    np.testing.assert_array_equal(np.sort(halton_order(*size)), np.arange(size[0] * size[1]))


def test_halton_counts_of_the_paper() -> None:
    written = np.diff(halton_counts(32, 256), prepend=0)
    assert (written[0], written[-2], written[-1], written.sum()) == (5, 17, 41, 256)


@pytest.mark.parametrize("schedule", SHARES)
@pytest.mark.parametrize("steps", [1, 2, 12, 16])
def test_counts_grow_by_one_at_least_until_all_are_known(schedule: str, steps: int) -> None:
    counts = confidence_counts(schedule, steps, 16)
    assert counts[-1] == 16
    assert (counts >= np.minimum(np.arange(1, steps + 1), 16)).all()
    assert (np.diff(counts) >= 0).all()


def test_one_third_of_the_way_is_what_float32_makes_of_it() -> None:
    """1 - arccos(1/2) / (pi/2) is a third, and in float32 a little less: 191 of 576 places."""
    assert halton_counts(2, 576).tolist() == [191, 576]
    np.testing.assert_array_equal(ramp(1.0, 1.3, 8)[[0, -1]], np.float32([1.0, 1.3]))


# Orders


@pytest.mark.parametrize("order", ["halton", "confidence"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_an_image_does_not_depend_on_its_batch(order: str, cfg_scale: float) -> None:
    program = PROGRAM.with_settings(order=order, cfg_scale=cfg_scale, roll=True)
    together = steps_of(program, (0, 2, 1), Draws(7, images=[0, 1, 2]))[-1].results[IDS]
    alone = steps_of(program, (2,), Draws(7, images=[1]))[-1].results[IDS]
    np.testing.assert_array_equal(together[1:2], alone)
    assert together.dtype == np.int64 and together.shape == (3, PLACES)
    assert together.min() >= 0 and together.max() < CODES


@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_a_recorded_run_is_replayed(order: str) -> None:
    program, draws = PROGRAM.with_settings(order=order), Draws(3, images=[0, 1], record=True)
    first = steps_of(program, draws=draws)
    again = steps_of(program, draws=Replay(draws.draws))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.state, b.state)


def test_places_come_in_halton_order() -> None:
    steps = steps_of(PROGRAM)
    known = np.stack([step.state != CODES for step in steps])
    for count, now in zip(halton_counts(5, PLACES), known, strict=True):
        assert set(np.flatnonzero(now[0])) == set(halton_order(SIDE, SIDE)[:count])
    assert [step.time for step in steps] == [1, 0.8, 0.6, 0.4, pytest.approx(0.2)]
    assert sum(step.decided or 0 for step in steps) == 2 * PLACES


def test_rolled_orders_begin_anywhere() -> None:
    program = PROGRAM.with_settings(roll=True)
    first = steps_of(program, tuple([0] * 8), Draws(0, images=range(8)))[0].state
    order = halton_order(SIDE, SIDE)
    begins = {tuple(np.flatnonzero(row != CODES)) for row in first}
    assert len(begins) > 3
    rolled = {tuple(np.sort(np.roll(order, shift)[: halton_counts(5, PLACES)[0]])) for shift in range(PLACES)}
    assert begins <= rolled


def test_without_noise_the_surest_places_come_first() -> None:
    sure = np.zeros((PLACES, CODES + 1), np.float32)
    sure[:, 1] = np.linspace(20, 40, PLACES)  # id 1 everywhere, and the more so the later the place
    program = PROGRAM.with_settings(order="confidence", choice_temperature=0.0)
    network = Stub(lambda codes, _: np.repeat(sure[None], len(codes), axis=0) / 10)
    replay = Replay([np.zeros((1, PLACES)) + [0, 0.5][n % 2] for n in range(10)])
    replay.draws = [np.ones((1, PLACES), np.int64) if n % 2 == 0 else draw for n, draw in enumerate(replay.draws)]
    steps = list(program.run({"transformer": [network]}, Request(1, (0,)), replay))
    for count, step in zip(confidence_counts("arccos", 5, PLACES), steps, strict=True):
        assert np.flatnonzero(step.state[0] != CODES).tolist() == list(range(PLACES - count, PLACES))


def test_a_step_goes_on_from_the_state_that_it_is_sent() -> None:
    network, other = Stub(), np.arange(2 * PLACES).reshape(2, PLACES) % CODES
    run = PROGRAM.run({"transformer": [network]}, Request(2, (0, 2)), Draws(0, images=[0, 1]))
    next(run)
    second = run.send(other)
    np.testing.assert_array_equal(network.made[1]["codes"].reshape(2, PLACES), other)
    new = halton_order(SIDE, SIDE)[slice(*halton_counts(5, PLACES)[:2])]
    np.testing.assert_array_equal(np.delete(second.state, new, axis=1), np.delete(other, new, axis=1))


# Guidance, temperature, top-k


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cfg_scale": 3.0}, [3, 3, 3, 3, 3]),
        ({"cfg_scale": 3.0, "order": "confidence"}, [1, 1.5, 2, 2.5, 3]),
        ({"cfg_scale": 3.0, "order": "confidence", "cfg_rule": "constant"}, [3, 3, 3, 3, 3]),
        ({"cfg_scale": 3.0, "cfg_start": 2.0, "cfg_rule": "linear"}, [2, 2.25, 2.5, 2.75, 3]),
        ({"cfg_scale": 3.0, "cfg_rule": "share"}, [1 + 2 * count / PLACES for count in halton_counts(5, PLACES)]),
        ({}, [1, 1, 1, 1, 1]),
    ],
)
def test_rules_of_the_guidance(settings: dict[str, Any], expected: list[float]) -> None:
    program = PROGRAM.with_settings(**settings)
    assert [program.scale_at(step, n / PLACES) for step, n in enumerate(halton_counts(5, PLACES))] == expected


def test_guidance_doubles_the_batch_and_drops_labels() -> None:
    network = Stub()
    program = PROGRAM.with_settings(order="confidence", cfg_scale=3.0)
    list(program.run({"transformer": [network]}, Request(2, (0, 2)), Draws(0, images=[0, 1])))
    assert [len(call["codes"]) for call in network.made] == [2, 4, 4, 4, 4]  # linear guidance begins with none
    assert network.made[1]["drop_label"].tolist() == [False, False, True, True]
    assert network.made[1]["labels"].tolist() == [0, 2, 0, 2]


def test_guidance_is_what_its_formula_says() -> None:
    seen = Stub()
    both = {0: np.full(CODES + 1, -50.0), CLASSES: np.full(CODES + 1, -50.0)}
    both[0][2], both[CLASSES][2] = 0.0, 1.0
    both[0][4], both[CLASSES][4] = 0.5, 3.0  # both favour 4; guided, 2 has 3 * 0 - 2 * 1, and 4 has 3 * 0.5 - 2 * 3
    seen.logits = lambda _, labels: np.stack([np.tile(both[label], (PLACES, 1)) for label in labels]).astype("f4")
    program = PROGRAM.with_settings(cfg_scale=3.0, steps=1, temperature=100.0)  # the likeliest is drawn
    draws = Replay([np.full((1, PLACES), 0.5, np.float32)])
    (step,) = program.run({"transformer": [seen]}, Request(1, (0,)), draws)
    assert set(step.state.ravel()) == {2}
    (plain,) = replace(program, cfg_scale=1.0).run({"transformer": [seen]}, Request(1, (0,)), Replay(draws.draws))
    assert set(plain.state.ravel()) == {4}


def test_temperature_multiplies_logits() -> None:
    logits = np.float32([[1.0, 2.0, 4.0, -1.0]])
    for temperature in (0.5, 1.0, 2.0):
        weights = np.exp(temperature * logits.astype(np.float64))
        np.testing.assert_allclose(probabilities(logits, temperature), weights / weights.sum(), rtol=1e-12)
    assert (probabilities(logits, 1.0, top_k=2)[0] > 0).tolist() == [False, True, True, False]
    assert probabilities(np.float32([1e4, -1e4]), 100.0).tolist() == [1.0, 0.0]


def test_temperatures_run_along_the_steps() -> None:
    program = PROGRAM.with_settings(temperature_start=1.0, temperature=3.0, temperature_power=2.0, warmup=2)
    np.testing.assert_allclose(program.temperatures(), [0.5, 1.125, 4.0, 6.25, 9.0])
    assert PROGRAM.with_settings(temperature=1.5).temperatures().tolist() == [1.5] * 5


# Results, and what is refused


def decoder(pixels: float) -> tuple[Any, Graph]:
    graph = Graph(
        (Port("codes", "int64", (BATCH, SIDE, SIDE), LATENT),), (Port("image", "float32", (BATCH, 3, 8, 8), PICTURE),)
    )

    class Decoder:
        graphs: Mapping[str, Graph] = {"model": graph}

        def __call__(self, name: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            assert name == "model"
            codes = inputs["codes"].repeat(2, axis=1).repeat(2, axis=2)[:, None] / (CODES - 1)
            return {"image": np.repeat(pixels + (1 - pixels) * codes, 3, axis=1).astype(np.float32)}

    return Decoder(), graph


@pytest.mark.parametrize("black", [-1.0, 0.0])
def test_a_decoder_makes_pictures(black: float) -> None:
    network, graph = decoder(black)
    program = replace(PROGRAM, decoding=Decoding("network", black=black))
    roles = {"transformer": [{"model": GRAPH}], "decoder": [{"model": graph}]}
    assert program.makes(roles) == {IDS: (PLACES,), PICTURES: (8, 8, 3)}
    last = steps_of(program, (0, 1, 2, 0, 1), decoder=[network])[-1]
    wanted = np.rint(last.results[IDS].reshape(-1, SIDE, SIDE) * 255 / (CODES - 1))
    np.testing.assert_array_equal(last.results[PICTURES][:, ::2, ::2, 0], wanted)


def test_what_stays_a_mask_becomes_the_last_code() -> None:
    network = Stub(lambda codes, _: np.eye(CODES + 1, dtype=np.float32)[np.full((len(codes), PLACES), CODES)] * 100)
    step = list(PROGRAM.run({"transformer": [network]}, Request(1, (0,)), Draws(0, images=[0])))[-1]
    assert set(step.state.ravel()) == {CODES} and set(step.results[IDS].ravel()) == {CODES - 1}


def test_logits_that_are_not_finite_end_a_run_whose_steps_are_told() -> None:
    network, told = Stub(lambda codes, _: np.full((len(codes), PLACES, CODES + 1), np.nan, np.float32)), []
    with pytest.raises(GateError, match="logits that are not finite") as error:
        for step in PROGRAM.run({"transformer": [network]}, Request(1, (0,)), Draws(0, images=[0])):
            told.append(step)
    assert len(told) == 5 and error.value.hint


def test_a_rehearsal_shows_the_calls() -> None:
    calls = rehearse(PROGRAM.with_settings(cfg_scale=2.0), {"transformer": [{"model": GRAPH}]})
    assert [(call.role, call.graph, len(call.inputs["codes"])) for call in calls] == [("transformer", "model", 2)] * 5


def test_facts_survive_a_manifest() -> None:
    program = replace(PROGRAM, decoding=Decoding("network", "llamagen-vq16-decoder"), temperature_start=0.5)
    assert program_from_json(program.to_json(), "m") == program


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"order": "magic"}, "magic"),
        ({"steps": 0}, "steps"),
        ({"cfg_scale": 0.5}, "cfg_scale"),
        ({"cfg_rule": "cosine"}, "cfg_rule"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"sampler": "ddim"}, "no setting 'sampler'"),
    ],
)
def test_settings_that_it_cannot_have(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as error:
        PROGRAM.with_settings(**settings)
    assert error.value.hint


def with_port(**changes: Any) -> Graph:
    """The graph with one port changed, or left out."""
    name = changes.pop("name")
    ports = [
        tuple(
            Port(**{**{key: getattr(port, key) for key in ("name", "dtype", "shape", "role", "range")}, **changes})
            if port.name == name
            else port
            for port in ports
        )
        for ports in (GRAPH.inputs, GRAPH.outputs)
    ]
    return Graph(*ports)


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        (with_port(name="codes", dtype="float32"), "codes is float32"),
        (with_port(name="codes", role=""), "is a state"),
        (with_port(name="codes", range=(0, 3)), "ids up to 3, and the mask is 6"),
        (with_port(name="labels", range=(0, 1)), "labels up to 1"),
        (with_port(name="drop_label", role=""), "nothing feeds the input drop_label"),
        (with_port(name="drop_label", dtype="int64"), "a drop is bool"),
        (with_port(name="logits", shape=(BATCH, PLACES, 3)), "of 6 codes or more"),
        (with_port(name="logits", shape=(BATCH, 9, 7)), "of every place"),
    ],
)
def test_networks_that_it_cannot_run(graph: Graph, named: str) -> None:
    with pytest.raises(UsageError, match=named) as error:
        PROGRAM.check({"transformer": [{"model": graph}]})
    assert error.value.hint or "up to" in named


def test_more_steps_than_places_and_other_decoders_are_refused() -> None:
    networks = {"transformer": [{"model": GRAPH}]}
    with pytest.raises(UsageError, match="17 steps for 16 places"):
        PROGRAM.with_settings(steps=17).check(networks)
    small = Graph((Port("codes", "int64", (BATCH, 3, 3), LATENT),), (Port("i", "float32", (BATCH, 3, 6, 6), PICTURE),))
    with pytest.raises(UsageError, match="there are 16 ids"):
        PROGRAM.check({**networks, "decoder": [{"model": small}]})
    with pytest.raises(UsageError, match="needs a null class"):
        replace(PROGRAM, condition=Condition("class", CLASSES), cfg_scale=2.0)
    with pytest.raises(UsageError, match="is one of 6 codes"):
        replace(PROGRAM, mask=3)
