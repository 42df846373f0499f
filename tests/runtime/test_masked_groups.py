"""The orders of MAGE and MaskGIT-r in numpy, with networks of a few lines in place of real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dexport.contract import (
    BATCH,
    LABEL,
    LATENT,
    LOGITS,
    MEMORY,
    PICTURE,
    POSITIONS,
    STATE,
    Condition,
    Decoding,
    Graph,
    Port,
)
from dexport.errors import UsageError
from dexport.runtime.calls import Recorder, rehearse
from dexport.runtime.draws import Draws
from dexport.runtime.programs import program_from_json
from dexport.runtime.programs.masked import Masked
from dexport.runtime.programs.masked_groups import mage_counts, maskgit_r_counts, sampling_temperatures
from dexport.runtime.programs.program import IDS, PICTURES, Calls, Request
from dexport.runtime.programs.recap import groups_of

PLACES, CODES, MASK, ROOM = 16, 6, 9, 12
PREFIX = 8


def graphs(prefix: int = 0, labels: bool = False, room: int = ROOM) -> dict[str, Graph]:
    def port(name: str, *shape: int, role: str, dtype: Any = "int64") -> Port:
        return Port(name, dtype, (BATCH, *shape), role)

    label = (port("labels", 1, role=LABEL),) if labels else ()
    memory = port("k_layer0", 1 + PLACES, 2, 3, role=MEMORY, dtype="float32")

    def logits(places: int) -> Port:
        return port("logits", prefix + places, CODES + 4, role=LOGITS, dtype="float32")

    ids = port("ids", prefix + PLACES, role=STATE)
    return {
        "model": Graph((ids, *label), (logits(PLACES),)),
        "full": Graph((ids, *label), (logits(PLACES), memory)),
        "light": Graph(
            (
                port("local_ids", prefix + room, role=STATE),
                port("group_positions", room, role=POSITIONS),
                *label,
                memory,
            ),
            (logits(room),),
        ),
    }


class Fake:
    """Logits that depend on the ids, the label and the graph; its memory is the ids."""

    def __init__(self, prefix: int = 0, labels: bool = False, room: int = ROOM) -> None:
        self.graphs = graphs(prefix, labels, room)
        rng = np.random.default_rng(3)
        self._table = rng.standard_normal((MASK + 1, CODES + 4)).astype(np.float32)
        self._places = rng.standard_normal((1 + PLACES, CODES + 4)).astype(np.float32)

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        ids = inputs["local_ids" if graph == "light" else "ids"]
        logits = 2 * self._table[ids] + self._places[: ids.shape[1]] + self._table[ids.sum(axis=1) % MASK][:, None]
        logits[..., CODES:] = 50.0  # no codes, so nobody may draw them
        if "labels" in inputs:
            logits = logits + inputs["labels"][..., None] * self._table[1]
        memory = np.broadcast_to(ids[:, :1, None, None], (len(ids), 1 + PLACES, 2, 3)).astype(np.float32)
        return {"logits": logits.astype(np.float32), **({"k_layer0": memory} if graph == "full" else {})}


def program(order: Any = "mage", **settings: Any) -> Masked:
    return Masked(codes=CODES, mask=MASK, order=order, **{"steps": 6, **settings})


def test_mage_leaves_a_cosine() -> None:
    """The figures of the official loop for 12 steps."""
    assert mage_counts(12, 256).tolist() == [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]
    assert mage_counts(PLACES, PLACES).tolist() == [1] * PLACES
    assert mage_counts(1, PLACES).tolist() == [PLACES]


def test_maskgit_r_decides_one_place_at_least() -> None:
    """Differences of floor(256 * (1 - (k/T)**2.5)), where zeros become 1 at the cost of the last step."""
    counts = maskgit_r_counts(32, 256)
    assert counts.sum() == 256 and counts.min() == 1
    assert counts[:8].tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    plain = np.floor(256 * (1 - (np.arange(32) / 32) ** 2.5))
    np.testing.assert_array_equal(counts[8:-1], -np.diff(plain)[8:])
    for steps in range(1, 65):
        counts = maskgit_r_counts(steps, 64)
        assert counts.sum() == 64 and counts.min() >= 1
    with pytest.raises(UsageError, match="too many"):
        maskgit_r_counts(65, 64)


def test_temperatures_go_from_one_to_the_last() -> None:
    np.testing.assert_allclose(
        sampling_temperatures(0.75, 5), [1, 0.875, 0.75 + 0.25 * (1 - 0.5**0.5), 0.783494, 0.75], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("recap", "sizes"),
    [
        ("", [1] * 6),
        ("2:1", [1, 1, 2, 2]),
        ("1:1", [1, 2, 2, 1]),
        ("0:2", [3, 3]),
        ("9:1", [1] * 6),
        ("0:0", [1] * 6),
        ("5:4", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_groups(recap: str, sizes: list[int]) -> None:
    groups = groups_of(6, recap)
    assert [len(group) for group in groups] == sizes
    assert [step for group in groups for step in group] == list(range(6))


@pytest.mark.parametrize("order", ["mage", "maskgit-r"])
@pytest.mark.parametrize("recap", ["", "2:1", "0:2"])
def test_every_step_decides_its_share_and_nothing_is_decided_twice(order: str, recap: str) -> None:
    counts = {"mage": mage_counts, "maskgit-r": maskgit_r_counts}[order](6, PLACES)
    network = Fake(room=PLACES)
    states = list(program(order, recap=recap).run({"transformer": [network]}, Request(3), Draws(0, [4, 5, 6])))
    before = np.full((3, PLACES), MASK)
    for count, step in zip(counts, states, strict=True):
        known = before != MASK
        np.testing.assert_array_equal(step.state[known], before[known])
        np.testing.assert_array_equal((step.state != MASK).sum(axis=1) - known.sum(axis=1), count)
        before = step.state
    assert before.max() < CODES
    np.testing.assert_array_equal(states[-1].results[IDS], before)


@pytest.mark.parametrize("order", ["mage", "maskgit-r"])
@pytest.mark.parametrize("recap", ["", "2:1"])
def test_equally_sure_places_are_decided_one_by_one_too(order: str, recap: str) -> None:
    network = Fake()
    network._table[:], network._places[:] = 0, 0
    run = program(order, recap=recap, choice_temperature=0.0)
    last = list(run.run({"transformer": [network]}, Request(2), Draws(0, [0, 1])))[-1]
    assert last.state.max() < CODES


@pytest.mark.parametrize("order", ["mage", "maskgit-r"])
def test_a_picture_does_not_depend_on_those_beside_it(order: str) -> None:
    run, network = program(order, recap="1:1"), Fake()
    together = list(run.run({"transformer": [network]}, Request(2), Draws(0, [4, 5])))[-1].state
    alone = list(run.run({"transformer": [network]}, Request(1), Draws(0, [5])))[-1].state
    np.testing.assert_array_equal(together[1:], alone)


@pytest.mark.parametrize("order", ["mage", "maskgit-r"])
def test_a_light_pass_is_given_its_group(order: str) -> None:
    """The ids decided so far at the places that the full pass chose, the prefix, and what the full pass kept."""
    prefix, settings = (PREFIX,), {"recap": "4:1", "prefix": (PREFIX,)}
    recorder = Recorder({"transformer": [Fake(len(prefix))]})
    states = list(program(order, **settings).run(recorder.calls, Request(2), Draws(0, [0, 1])))
    assert [call.graph for call in recorder.made] == ["model"] * 4 + ["full", "light"]
    full, light = recorder.made[4:]
    assert (full.inputs["ids"][:, 0] == PREFIX).all() and (light.inputs["local_ids"][:, 0] == PREFIX).all()
    np.testing.assert_array_equal(full.inputs["ids"][:, 1:], states[3].state)
    assert light.inputs["k_layer0"] is full.outputs["k_layer0"]
    size = (states[3].state == MASK).sum(axis=1)[0]
    for image in range(2):
        places = light.inputs["group_positions"][image]
        assert (places[size:] == -1).all()
        np.testing.assert_array_equal(np.sort(places[:size]), np.flatnonzero(states[3].state[image] == MASK))
        np.testing.assert_array_equal(
            light.inputs["local_ids"][image, 1 : 1 + size], states[4].state[image, places[:size]]
        )


def test_mage_keeps_what_it_drew_where_it_was_surest() -> None:
    """The first ids of a group are those of the full pass, at the places with the most likely draws."""
    run = program(recap="4:1", choice_temperature=0.0)
    grouped = list(run.run({"transformer": [Fake()]}, Request(2), Draws(0, [0, 1])))
    plain = list(run.with_settings(recap="").run({"transformer": [Fake()]}, Request(2), Draws(0, [0, 1])))
    np.testing.assert_array_equal(grouped[4].state, plain[4].state)
    assert not np.array_equal(grouped[5].state, plain[5].state)


class FakeDecoder:
    """Pictures of 4x4 pixels, in which a code is as bright as it is large."""

    graphs: Mapping[str, Graph] = {
        "model": Graph(
            (Port("ids", "int64", (BATCH, PLACES), LATENT),), (Port("image", "float32", (BATCH, 1, 4, 4), PICTURE),)
        )
    }

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        assert graph == "model"
        return {"image": (inputs["ids"] / (CODES - 1)).reshape(-1, 1, 4, 4).astype(np.float32)}


def test_pictures_in_which_black_is_0() -> None:
    run = program(decoding=Decoding("network", black=0.0))
    calls: Calls = {"transformer": [Fake()], "decoder": [FakeDecoder()]}
    last = list(run.run(calls, Request(2), Draws(0, [0, 1])))[-1]
    expected = (last.state * (255 / (CODES - 1))).round().astype(np.uint8).reshape(2, 4, 4, 1)
    np.testing.assert_array_equal(last.results[PICTURES], expected)


class TestGuidance:
    CONDITION = Condition("class", 3, null=3)

    def scales(self, **settings: Any) -> list[float]:
        """s of every evaluation, out of what Transformer combines."""
        run = program("maskgit-r", condition=self.CONDITION, **settings)
        known = np.cumsum(maskgit_r_counts(6, PLACES)) / PLACES
        return [run.scale_at(step, float(known[step])) for step in range(6)]

    def test_linear_in_the_step(self) -> None:
        assert self.scales(cfg_scale=1.1, cfg_start=1.05) == pytest.approx(np.linspace(1.05, 1.1, 6))

    def test_constant(self) -> None:
        assert self.scales(cfg_scale=3.0, cfg_rule="constant") == [3.0] * 6

    def test_linear_in_the_known_share(self) -> None:
        known = np.cumsum(maskgit_r_counts(6, PLACES)) / PLACES
        assert self.scales(cfg_scale=3.0, cfg_rule="share") == pytest.approx(1 + 2 * known)

    @pytest.mark.parametrize("rule", ["linear", "share"])
    def test_both_halves_go_through_every_pass_of_a_group(self, rule: str) -> None:
        """Also in a step whose scale is 1, as memories of both are needed in the next."""
        run = program("maskgit-r", condition=self.CONDITION, recap="0:1", cfg_scale=2.0, cfg_rule=rule)
        recorder = Recorder({"transformer": [Fake(labels=True)]})
        list(run.run(recorder.calls, Request(2, (0, 2)), Draws(0, [0, 1])))
        for call in recorder.made:
            assert call.inputs["labels"].tolist() == [[0], [2], [3], [3]]
            if call.graph == "light":
                halves = call.inputs["group_positions"]
                np.testing.assert_array_equal(halves[:2], halves[2:])
                assert len(call.inputs["k_layer0"]) == 4

    def test_a_light_pass_has_the_scale_of_the_step_before(self) -> None:
        """So the official loop has it."""
        settings = {"condition": self.CONDITION, "recap": "4:1", "cfg_rule": "linear"}
        guided = program("maskgit-r", cfg_scale=1.5, cfg_start=1.5, **settings)
        constant = guided.with_settings(cfg_rule="constant")
        request = Request(2, (0, 2))
        runs = [
            list(run.run({"transformer": [Fake(labels=True)]}, request, Draws(0, [0, 1])))[-1].state
            for run in (guided, constant)
        ]
        np.testing.assert_array_equal(*runs)


def test_a_program_with_groups_is_what_its_json_says() -> None:
    made = program("maskgit-r", recap="4:1", prefix=(PREFIX,), sampling_temperature=0.75)
    assert program_from_json(made.to_json(), "manifest") == made
    assert made.title == "6 steps by maskgit-r, recap 4:1"


def test_mage_with_recap_says_whose_reading_it_is() -> None:
    assert "own reading" in program(recap="4:1").title
    assert "own reading" not in program().title


@pytest.mark.parametrize(
    ("order", "settings", "dropped", "reason"),
    [
        ("mage", {"recap": "12"}, (), "not PRE_FULL:NUM_CACHE"),
        ("mage", {"recap": "1:-1"}, (), "not PRE_FULL:NUM_CACHE"),
        ("confidence", {"recap": "1:1"}, (), "not decided in groups"),
        ("halton", {"recap": "1:1"}, (), "not decided in groups"),
        ("mage", {"recap": "1:1"}, ("light",), "needs the graphs full and light, and the bundle has model, full"),
        ("mage", {"recap": "1:1"}, ("full",), "needs the graphs full and light"),
        ("mage", {"recap": "0:5"}, (), "make a group of 16 places, and a light pass takes 12"),
        ("maskgit-r", {"steps": 17}, (), "17 steps for 16 places"),
        ("mage", {"steps": 17}, (), "17 steps for 16 places"),
    ],
)
def test_what_cannot_be_is_refused(order: str, settings: dict[str, Any], dropped: tuple[str, ...], reason: str) -> None:
    kept = {name: graph for name, graph in graphs().items() if name not in dropped}
    with pytest.raises(UsageError, match=reason):
        rehearse(program(order, **settings), {"transformer": [kept]})


def test_memories_that_do_not_fit_are_refused() -> None:
    known = graphs()
    other = Port("v_layer0", "float32", (BATCH, 1 + PLACES, 2, 3), MEMORY)
    known["light"] = Graph((*known["light"].inputs, other), known["light"].outputs)
    with pytest.raises(UsageError, match="takes v_layer0, which full does not give"):
        rehearse(program(recap="4:1"), {"transformer": [known]})
    rehearse(program(), {"transformer": [known]})
