"""Budgets: what is understood, what is chosen, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import dexport
from dexport.cli import main
from dexport.errors import GateError, InputError, UsageError
from dexport.exporter.quantize import assign
from dexport.exporter.quantize.assign import Option, TradeOff, total_error, total_size
from dexport.exporter.quantize.budget import Budget, Search, parse_budget
from dexport.exporter.quantize.calibrate import Calibration
from dexport.exporter.quantize.plan import Plan
from dexport.exporter.quantize.request import Quantisation
from dexport.exporter.quantize.rounded import RoundedWeights
from dexport.exporter.quantize.sensitivity import as_json, measure_sensitivity
from dexport.exporter.quantize.simulate import Simulation
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import RandomSource
from tests.bundles import NARROW

few = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snr>=25", {"snr_db": 25}),
        ("snr >= 25.5dB", {"snr_db": 25.5}),
        ("size<=0.3", {"fraction": 0.3}),
        ("size<=2.5MB", {"megabytes": 2.5}),
        ("size<=0.3,snr>=20", {"snr_db": 20, "fraction": 0.3}),
    ],
)
def test_what_a_budget_says(text: str, expected: dict[str, float]) -> None:
    assert parse_budget(text) == Budget(text, **expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no budget"),
        ("psnr>=3", "'psnr>=3' is no budget"),
        ("snr<=3", "is no budget"),
        ("snr>=1.2.3", "is no budget"),
        ("size<=30%", "is no budget"),
        ("snr>=3,snr>=4", "says the same thing twice"),
        ("size<=0.3,size<=2MB", "says the same thing twice"),
        ("snr>=0", "above 0 dB"),
        ("size<=1", "below 1"),
    ],
)
def test_what_is_no_budget(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_budget(text)
    assert "snr>=25" in caught.value.hint


OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-8, 1.0)), min_size=2, max_size=4), min_size=1, max_size=5
)


def named(drawn: list[list[tuple[int, float]]]) -> dict[str, dict[str, Option]]:
    return {
        f"layer{n}": {f"scheme{k}": Option(*cost) for k, cost in enumerate(schemes)} for n, schemes in enumerate(drawn)
    }


def all_assignments(options: Mapping[str, Mapping[str, Option]]) -> list[dict[str, str]]:
    return [dict(zip(options, choice, strict=True)) for choice in itertools.product(*options.values())]


@given(OPTIONS, st.integers(1, 4000), st.floats(-8, 1))
@few
def test_the_choice_is_that_of_brute_force(drawn: list, max_size: int, exponent: float) -> None:
    options, max_error = named(drawn), 10**exponent
    everything, chosen = all_assignments(options), TradeOff(options)
    fitting = [total_error(options, one) for one in everything if total_size(options, one) <= max_size]
    found = chosen.most_exact(max_size)
    assert (found is None) == (not fitting)
    if found is not None:
        assert total_size(options, found) <= max_size
        assert total_error(options, found) == pytest.approx(min(fitting), rel=1e-9)
    enough = [total_size(options, one) for one in everything if total_error(options, one) <= max_error * (1 - 1e-9)]
    found = chosen.smallest(max_error)
    if enough:
        assert found is not None
        assert total_size(options, found) <= min(enough)
        assert total_error(options, found) <= max_error * (1 + 1e-9)


def test_a_long_front_is_thinned_without_losing_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    kinds = [(4000, 1e-9), (1000, 1e-5), (500, 1e-3), (250, 1e-2)]
    drawn = [[(size * rng.uniform(1, 3), error * rng.lognormal()) for size, error in kinds] for _ in range(12)]
    exact = TradeOff(named(drawn))
    monkeypatch.setattr(assign, "LARGEST_FRONT", 60)
    thinned = TradeOff(named(drawn))
    assert len(thinned.sizes) <= 60 < len(exact.sizes)
    for max_error in (1e-3, 1e-2):
        sizes = [total_size(named(drawn), front.smallest(max_error) or {}) for front in (exact, thinned)]
        assert sizes[0] <= sizes[1] <= sizes[0] * 1.2


def test_an_infinite_error_is_never_chosen() -> None:
    options = {"a": {"float": Option(4, 0.0), "ternary": Option(1, math.inf)}}
    assert TradeOff(options).most_exact(3) is None
    assert TradeOff(options).smallest(1.0) == {"a": "float"}


LAYERS = {
    f"layer{n}": {
        "float": Option(4000, 0.0),
        "int8": Option(1000, 1e-5 * (n + 1)),
        "int4": Option(500, 1e-3 * (n + 1)),
        "ternary": Option(250, 3e-2 * (n + 1)),
    }
    for n in range(6)
}
BASE = 700


def search(amplified_db: float, per_layer: int = 0) -> Search:
    """Trajectories that lose ``amplified_db`` more than the predictions do, and files larger than estimated."""

    def snr(schemes: Mapping[str, str]) -> float:
        error = total_error(LAYERS, schemes)
        return math.inf if error == 0 else -10 * math.log10(error) - amplified_db

    def size(schemes: Mapping[str, str]) -> int:
        return int(BASE + total_size(LAYERS, schemes)) + per_layer * sum(s != "float" for s in schemes.values())

    return Search(LAYERS, size, snr, lambda *_: None)


FLOAT_BYTES = BASE + 6 * 4000


@pytest.mark.parametrize("amplified_db", [-9.0, -3.0, 0.0, 4.0, 12.0])
@pytest.mark.parametrize("snr_db", [5.0, 15.0, 25.0, 40.0, 80.0])
def test_trials_find_the_smallest_file_of_an_snr(snr_db: float, amplified_db: float) -> None:
    found = search(amplified_db)
    schemes, trial = found.meet(parse_budget(f"snr>={snr_db}"), FLOAT_BYTES)
    assert trial.snr_db >= snr_db
    good = [s for s in all_assignments(LAYERS) if found.snr_of(s) >= snr_db]
    best = min(map(found.size_of, good))
    close = [s for s in good if found.snr_of(s) >= snr_db + 0.5]
    assert best <= trial.size == found.size_of(schemes) <= max(best, min(map(found.size_of, close)))


@pytest.mark.parametrize("share", [0.06, 0.1, 0.2, 0.5, 0.99])
def test_a_size_holds_for_the_real_file(share: float) -> None:
    found = search(3.0, per_layer=20)
    schemes, trial = found.meet(parse_budget(f"size<={max(share, 0.1)}"), FLOAT_BYTES)
    assert found.size_of(schemes) == trial.size <= max(share, 0.1) * FLOAT_BYTES


def test_what_cannot_be_met_is_refused_with_the_closest_point() -> None:
    with pytest.raises(GateError, match=r"cannot be met: 40 dB takes .* and .* give 1[0-9.]+ dB") as caught:
        search(3.0).meet(parse_budget("snr>=40,size<=0.15"), FLOAT_BYTES)
    assert "snr>=1" in caught.value.hint
    with pytest.raises(GateError, match=r"the smallest file has 0.00 MB \([-0-9.]+ dB\)"):
        search(3.0).meet(parse_budget("size<=0.01"), FLOAT_BYTES)
    schemes, trial = search(0.0).meet(parse_budget("snr>=20,size<=0.3"), FLOAT_BYTES)
    assert trial.snr_db >= 20 and trial.size <= 0.3 * FLOAT_BYTES
    assert set(schemes) == set(LAYERS)


# The network


VARIANT = resolve(find_recipe("dit-fashion"), NARROW)
CANDIDATES = {"blocks.0.attn.qkv": ("int8",), "blocks.0.mlp.fc2": ("int8",), "x_embedder.proj": ("int8",)}


def simulation(folder: Path) -> Simulation:
    return Simulation(VARIANT, RandomSource(VARIANT.meta_module(), 0), RoundedWeights(folder))


def test_sensitivity_goes_on_after_a_kill_with_the_same_figures(tmp_path: Path) -> None:
    simulated = simulation(tmp_path)
    whole = measure_sensitivity(simulated, CANDIDATES, "key", tmp_path / "whole.json", lambda *_: None)
    assert all(0 < errors["int8"] < 1e-2 for errors in whole.values())
    told: list[int] = []

    def killed(done: int, _total: int, _detail: str) -> None:
        told.append(done)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(simulated, CANDIDATES, "key", tmp_path / "part.json", killed)
    again = measure_sensitivity(
        simulated, CANDIDATES, "key", tmp_path / "part.json", lambda done, *_: told.append(done)
    )
    assert told == [0, 1, 2, 2]
    assert again == whole
    measure_sensitivity(simulated, CANDIDATES, "other", tmp_path / "part.json", lambda done, *_: told.append(done))
    assert told[4:] == [0, 1, 2]
    (tmp_path / "part.json").write_text("{")
    with pytest.raises(InputError, match=r"holds no sensitivities"):
        measure_sensitivity(simulated, CANDIDATES, "key", tmp_path / "part.json", killed)


def test_an_infinite_sensitivity_is_null_in_json_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, file, names = simulation(tmp_path), tmp_path / "s.json", list(CANDIDATES)
    real = simulated.predictions
    calls: list[int] = []

    def overflowing(states: Any) -> Any:
        calls.append(1)
        return [np.full_like(x, np.inf) for x in real(states)] if len(calls) == 2 else real(states)

    monkeypatch.setattr(simulated, "predictions", overflowing)
    whole = measure_sensitivity(simulated, CANDIDATES, "key", file, lambda *_: None)
    assert [math.isinf(whole[name]["int8"]) for name in names] == [True, False, False]
    stored = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert stored["errors"] == as_json(whole)
    assert stored["errors"][names[0]] == {"int8": None}
    assert measure_sensitivity(simulated, CANDIDATES, "key", file, lambda *_: None) == whole
    assert len(calls) == 4
    quantisation = Quantisation(Plan({}), Calibration(), {"asked": "snr>=25"}, whole)
    report = json.loads(quantisation.reports({})["sensitivity.json"], parse_constant=pytest.fail)
    assert report["squared relative error"] == stored["errors"]


def test_what_is_compared_is_guided(tmp_path: Path) -> None:
    simulated = simulation(tmp_path)
    states = simulated.states()
    assert VARIANT.recipe.guidance is not None
    for call, prediction in zip(states, simulated.predictions(states), strict=True):
        assert call.inputs["cfg_scale"] == np.float32(VARIANT.recipe.guidance.default_scale)
        assert prediction.shape == call.inputs["x"].shape


def test_weights_are_back_after_a_simulation(tmp_path: Path) -> None:
    simulated = simulation(tmp_path)
    assert simulated.snr_db({"blocks.0.attn.qkv": "float"}) == math.inf
    assert 20 < simulated.snr_db({"blocks.0.attn.qkv": "int8"}) < 80
    assert simulated.snr_db({}) == math.inf


def test_a_build_meets_its_budget_and_says_so(tmp_path: Path) -> None:
    options = {"settings": NARROW, "calibration_images": 4, "profile": "ci", "parity": False}
    with pytest.raises(GateError, match=r"cannot be met: 60 dB takes"):
        dexport.build("dit-fashion", tmp_path / "out", budget="snr>=60,size<=0.8", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rounded", "out.sensitivity.json"]
    manifest = dexport.build("dit-fashion", tmp_path / "out", budget="snr>=25", **options).bundle.network.manifest
    budget = manifest["precision"]["budget"]
    assert budget["snr_db"] >= 25
    assert budget["bytes"] == pytest.approx(manifest["sizes"]["onnx"], abs=2500)
    assert budget["bytes"] < budget["float_bytes"]
    schemes = manifest["precision"]["layers"]
    assert {schemes[path] for path in schemes if path.startswith("t_embedder")} == {"float"}
    assert set(schemes.values()) - {"float"}
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "out")]).output
    assert f"budget snr>=25: {budget['snr_db']:.1f} dB after 20 steps" in shown
    report = json.loads((tmp_path / "out/reports/sensitivity.json").read_text())
    assert report["budget"] == budget
    assert report["squared relative error"].keys() == {path for path in schemes if not path.startswith("t_embedder")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "snr>=25", "int8": "weight"}, r"--quantize int8 and budget exclude each other"),
        ({"budget": "snr>=25", "ternary": True}, r"--quantize ternary excludes"),
        ({"budget": "fast"}, r"is no budget"),
    ],
)
def test_contradictions_are_refused_before_work_starts(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        dexport.build("dit-fashion", tmp_path / "out", settings=NARROW, **options)
    assert not any(tmp_path.iterdir())
