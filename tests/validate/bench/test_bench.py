"""``dexport bench``: what is timed, what is told, and what is refused. The clock is the test's."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dexport.bundle import change_manifest, load_bundle
from dexport.cli import main
from dexport.errors import GateError, InputError, MachineError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.runtime.session import OnnxSession
from dexport.validate.bench import bench as module
from dexport.validate.bench import torch_baseline as eager
from dexport.validate.bench.bench import bench, example
from dexport.validate.bench.timing import Estimate, estimate, take_turns
from dexport.validate.gates import OF_BENCH, parse_limits
from tests.bundles import NARROW

SIDES = [("model", "ONNX file"), ("PyTorch", "cpu")]


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "PRODUCT_SIDE", 8)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def ticking(*seconds: float) -> Callable[[], float]:
    """A clock by which the sides of a round take these seconds, over and over."""
    durations = itertools.cycle(seconds)
    ticks = itertools.accumulate(itertools.chain.from_iterable((0.0, next(durations)) for _ in itertools.count()))
    return lambda: next(ticks)


def limits(**given: float) -> Any:
    under = [f"{name}={value}" for name, value in given.items() if name != "wall_ms"]
    return parse_limits(under, [f"{name}={value}" for name, value in given.items() if name == "wall_ms"], OF_BENCH)


def change_network(path: Path, graph: dict[str, Any] | None = None, **fields: Any) -> None:
    """Say something else of a bundle's only network, or of its main graph."""
    bundle = load_bundle(path)
    network = bundle.network
    graphs = {**network.manifest["graphs"], network.main_graph: {**network.entry(), **(graph or {})}}
    entry = {**network.manifest, "graphs": graphs, **fields}
    change_manifest(bundle, networks={network.name: entry})


def test_sides_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    times = take_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"},  # type: ignore[misc]
        3,
        wall=ticking(1, 2, 3, 4, 5, 9),
        cpu=ticking(0.5),
    )
    assert calls == list("abababab")
    assert times["a"].wall == (1, 3, 5)
    assert (times["b"].median, times["b"].fastest, times["b"].median_cpu) == (4, 2, 0.5)


def test_a_bundle_beside_pytorch(plain: Path) -> None:
    # In every round: the matrix product, the model, PyTorch.
    report = bench(plain, batches=(1, 3), threads=1, rounds=2, wall=ticking(1, 2, 5), cpu=ticking(1))
    assert [result.batch for result in report.results] == [1, 3]
    for result in report.results:
        ours, theirs = result.rows
        assert [(row.owner, row.kind) for row in result.rows] == SIDES
        assert (ours.wall_ms, ours.fastest_ms, ours.cpu_ms) == pytest.approx((2000, 2000, 1000))
        assert (ours.speedup, theirs.speedup) == pytest.approx((2.5, 1))
        assert ours.images_per_s == pytest.approx(result.batch / 2)
        assert ours.runner.endswith("CPUExecutionProvider")
        assert theirs.runner.startswith("PyTorch")
        assert result.gflop is not None
        assert result.peak_gflop_s is not None
        assert ours.of_peak == pytest.approx(result.gflop / 2 / result.peak_gflop_s)
    assert (report.passed, report.gates, report.not_run) == (True, (), ())
    json.dumps(report.to_json(), allow_nan=False)


def test_arithmetic_is_that_of_the_network() -> None:
    linear_per_token = 4 * 16**2 + 2 * 4 * 16**2  # qkv, projection and the feed-forward network of one block
    variant = resolve(find_recipe("dit-fashion"), NARROW)
    counted = [eager.Eager.of_variant(variant, None).flops(batch) for batch in (1, 2)]
    tokens = (variant.latent[0] // variant.config["patch_size"]) ** 2
    assert counted[1] == 2 * counted[0]
    assert counted[0] > 2 * tokens * linear_per_token


def test_another_model_and_gates(plain: Path, other: Path) -> None:
    given = limits(speedup=2, speedup_against=2, wall_ms=2500)
    # The matrix product, the model, the other one, PyTorch.
    report = bench(plain, against=other, threads=1, rounds=1, limits=given, wall=ticking(1, 2, 3, 5))
    assert [row.owner for row in report.results[0].rows] == ["model", "other", "PyTorch"]
    found = {gate.metric: (gate.value, gate.verdict, gate.where) for gate in report.gates}
    where = "ONNX file, batch 2"
    assert found["speedup"] == (pytest.approx(2.5), "pass", where)
    assert found["speedup_against"] == (pytest.approx(1.5), "FAIL", where)
    assert found["wall_ms"] == (pytest.approx(2000), "pass", where)
    assert not report.passed


def test_the_worst_batch_is_judged(plain: Path) -> None:
    clock = ticking(1, 2, 5, 1, 4, 5)
    report = bench(plain, batches=(1, 2), threads=1, rounds=1, limits=limits(speedup=2), wall=clock)
    assert report.gates[0].value == pytest.approx(1.25)
    assert report.gates[0].where == "ONNX file, batch 2"


def test_a_foreign_file(trained: Path, plain: Path) -> None:
    file = trained / "model.onnx"
    report = bench(file, recipe="dit-fashion-s", against=file, threads=1, rounds=1)
    assert [row.owner for row in report.results[0].rows] == ["model", "other", "PyTorch"]
    assert any("random weights" in note for note in report.notes)
    with pytest.raises(UsageError, match="does not say what it computes"):
        bench(file)
    with pytest.raises(InputError, match="the recipe has z"):
        bench(file, recipe="sd-vae-decoder")
    with pytest.raises(UsageError, match="does not exist"):
        bench(plain.parent / "missing.onnx", recipe="dit-fashion-s")


def test_models_of_other_inputs_are_refused(plain: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(plain, small)
    state, *others = load_bundle(small).network.entry()["inputs"]
    change_network(small, {"inputs": [{**state, "shape": ["B", 4, 8, 8]}, *others]})
    with pytest.raises(InputError, match=r"takes x \['B', 4, 8, 8\], t"):
        bench(plain, against=small)
    with pytest.raises(InputError, match=r"x is tensor\(float\)"):
        bench(small, against=plain / "model.onnx")


def test_lost_weights_are_replaced_and_told(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "b")
    weights = load_bundle(tmp_path / "b").network.manifest["weights"]
    change_network(tmp_path / "b", weights={**weights, "path": "gone.pt"})
    report = bench(tmp_path / "b", threads=1, rounds=1)
    assert "gone.pt" in report.notes[0]
    assert report.results[0].rows[1].owner == "PyTorch"
    with pytest.raises(UsageError, match="which is not there"):
        bench(tmp_path / "b", checkpoint="elsewhere.pt", limits=limits(speedup=1))


def test_a_network_that_is_not_known_here_is_not_run(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "b")
    change_network(tmp_path / "b", recipe={"name": "mine", "family": "", "source": ""})
    report = bench(tmp_path / "b", threads=1, rounds=1)
    assert [row.owner for row in report.results[0].rows] == ["model"]
    assert report.results[0].rows[0].speedup is None
    assert "no recipe named 'mine'" in report.not_run[0]
    with pytest.raises(UsageError, match="no recipe named 'mine'"):
        bench(tmp_path / "b", limits=limits(speedup=1))


def test_without_torch_the_model_is_timed_alone(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dexport.validate.bench.torch_baseline")
    monkeypatch.delattr("dexport.validate.bench.torch_baseline")
    monkeypatch.setitem(sys.modules, "torch", None)
    report = bench(plain, threads=1, rounds=1)
    assert report.not_run == ("PyTorch: torch is not installed",)
    assert report.results[0].gflop is None
    with pytest.raises(MachineError, match="torch is not installed"):
        bench(plain, limits=limits(speedup=1))


def test_an_engine_that_cannot_run_is_told(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(plain, tmp_path / "b")
    change_network(tmp_path / "b", {"engine": {}})

    def no_gpu(*_: object) -> None:
        raise MachineError("there is no GPU")

    monkeypatch.setattr("dexport.validate.bench.contestants.TensorRtSession", no_gpu)
    report = bench(tmp_path / "b", threads=1, rounds=1)
    assert report.not_run == ("model, engine: there is no GPU",)


def test_an_engine_is_compared_with_pytorch_on_the_gpu(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(plain, tmp_path / "b")
    change_network(tmp_path / "b", {"engine": {}})
    monkeypatch.setattr(
        "dexport.validate.bench.contestants.TensorRtSession",
        lambda network, graph: OnnxSession(network.model_path(graph)),
    )
    monkeypatch.setattr(eager.Eager, "session", lambda *_: OnnxSession(plain / "model.onnx"))
    # The matrix product, the file, the engine, PyTorch on the CPU and on the GPU.
    report = bench(tmp_path / "b", threads=1, rounds=1, wall=ticking(1, 4, 1, 6, 3), limits=limits(speedup=2))
    assert [(row.kind, row.speedup) for row in report.results[0].rows] == [
        ("ONNX file", pytest.approx(1.5)),
        ("engine", pytest.approx(3)),
        ("cpu", pytest.approx(1)),
        ("cuda", pytest.approx(1)),
    ]
    assert report.results[0].rows[1].of_peak is None
    assert (report.gates[0].value, report.gates[0].where) == (pytest.approx(1.5), "ONNX file, batch 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "start at 1"),
        ({"batches": (0,)}, "start at 1"),
        ({"threads": -1}, "start at 1"),
        ({"limits": limits(speedup_against=1)}, "there is no other model"),
    ],
)
def test_refused_before_any_work(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(plain, **options)


def test_one_of_several_networks_is_timed_by_its_name(stitched: Path) -> None:
    with pytest.raises(UsageError, match="holds 2 networks of the role denoiser") as refused:
        bench(stitched)
    assert "--network denoiser.0" in refused.value.hint
    for wrong in ({"network": "denoiser.2"}, {"network": "denoiser.0", "graph": "guided"}):
        with pytest.raises(UsageError, match="has no"):
            bench(stitched, **wrong)
    report = bench(stitched, network="denoiser.1", threads=1, rounds=1)
    assert [(row.owner, row.kind) for row in report.results[0].rows] == SIDES


def test_a_busy_machine_is_told(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "getloadavg", lambda: (0.1, 0, 0))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    assert not bench(plain, threads=4, rounds=1).notes
    monkeypatch.setattr(module.os, "getloadavg", lambda: (3.0, 0, 0))
    assert "a load of 3.0 on 4 cores" in bench(plain, threads=2, rounds=1).notes[0]


def test_example_inputs_have_the_shapes_of_the_ports(plain: Path) -> None:
    inputs = example(OnnxSession(plain / "model.onnx").inputs.values(), 3)  # type: ignore[arg-type]
    assert {name: (array.shape, array.dtype) for name, array in inputs.items()} == {
        "x": ((3, 4, 16, 16), np.float32),
        "t": ((3,), np.float32),
        "y": ((3,), np.int64),
    }


def test_exit_codes_and_views(plain: Path) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(main, ["bench", str(plain), "--threads=1", "--rounds=1", *options])

    shown = run("--fail-over", "wall_ms=1e9")
    assert shown.exit_code == 0
    assert "model, ONNX file" in shown.stdout
    failed = run("--fail-over", "wall_ms=0", "--json")
    assert failed.exit_code == GateError.exit_code
    assert json.loads(failed.stdout)["passed"] is False
    assert run("--fail-under", "snr=3").exit_code == UsageError.exit_code
    assert run("--fail-under", "wall_ms=3").exit_code == UsageError.exit_code
    assert run("--provider=cuda").exit_code == MachineError.exit_code


@pytest.mark.parametrize(
    ("samples", "low", "value", "high"),
    [
        ([2.0], 2 / 1.2, 2.0, 2 * 1.2),
        ([3.0, 1.0, 2.0], 1 / 1.2, 2.0, 3 * 1.2),
        ([7.0, 1.0, 2.0, 5.0, 4.0, 3.0, 6.0], 1.0, 4.0, 7.0),
        (list(range(1, 10)), 2.0, 5.0, 8.0),
        (list(range(1, 21)), 6.0, 10.5, 15.0),
    ],
)
def test_the_interval_of_a_median(samples: list[float], low: float, value: float, high: float) -> None:
    found = estimate(samples)
    assert (found.low, found.value, found.high) == pytest.approx((low, value, high))


SPEED, AGAINST, TIME = "speedup", "speedup_against", "wall_ms"


@pytest.mark.parametrize("metric", [SPEED, AGAINST, TIME])
@pytest.mark.parametrize(
    ("low", "value", "high", "busy", "expected"),
    [  # in units of the limit, more is better
        (1.1, 1.2, 1.3, "", "pass"),
        (0.9, 1.2, 1.3, "", "inconclusive"),
        (0.8, 0.9, 1.1, "", "inconclusive"),
        (0.7, 0.8, 0.9, "", "FAIL"),
        (0.7, 0.8, 0.9, "busy", "inconclusive"),
        (1.1, 1.2, 1.3, "busy", "inconclusive"),
        (1.1, 60.0, 80.0, "", "inconclusive"),
        (0.1, 0.2, 0.9, "", "inconclusive"),
    ],
)
def test_what_cannot_be_decided_is_no_pass(
    metric: str, low: float, value: float, high: float, busy: str, expected: str
) -> None:
    more = metric != TIME
    found = Estimate(value, low, high) if more else Estimate(1 / value, 1 / high, 1 / low)
    gate = module._judge(module.Measured(metric, "", found), 1.0, "default", busy, more)
    if not more and low > 1:  # other programs only ever take time
        expected = "pass"
    assert gate.verdict == expected
    assert bool(gate.advice) == (expected == "inconclusive")
    assert gate.to_json()["advice"] == gate.advice


def test_a_ratio_measured_under_load_does_not_pass(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "getloadavg", lambda: (5.6, 0, 0))
    clock = ticking(1, 1, 80)
    report = bench(plain, threads=1, rounds=7, limits=limits(speedup=1.2, wall_ms=2000), wall=clock)
    assert [gate.verdict for gate in report.gates] == ["inconclusive", "pass"]
    assert "a load of 5.6" in report.gates[0].advice
    assert not report.passed
    monkeypatch.setattr(module.os, "getloadavg", lambda: (0.0, 0, 0))
    assert bench(plain, threads=1, rounds=7, limits=limits(speedup=1.2), wall=clock).passed


def test_rounds_that_differ_do_not_decide(plain: Path) -> None:
    # Three rounds of the matrix product, the model, PyTorch: 0.5, 4 and 40 times as fast.
    clock = ticking(1, 2, 1, 1, 1, 4, 1, 1, 40)
    report = bench(plain, threads=1, rounds=9, limits=limits(speedup=1.2), wall=clock)
    assert (report.gates[0].verdict, report.passed) == ("inconclusive", False)
    assert report.gates[0].low == pytest.approx(0.5)


def test_an_inconclusive_gate_exits_with_1(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "getloadavg", lambda: (50.0, 0, 0))
    options = ["bench", str(plain), "--threads=1", "--rounds=2", "--fail-under", "speedup=1e-9"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == GateError.exit_code
    assert "inconclusive" in result.stdout and "a load of 50.0" in result.stdout
