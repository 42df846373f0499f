"""The parts of benchmarks/gpu/ops.py that need no GPU."""

from __future__ import annotations

import pytest
import torch
from running import error, reference

pytest.importorskip("triton")

from benchmarks.gpu import ops
from benchmarks.gpu.problems import channel_problem, linear_problem, published, ternary_problem, tmsa_problem
from benchmarks.gpu.rivals import EAGER, SDPA
from dexport.plugins.compile import PUBLISHED_SIZES
from dexport.plugins.tiles import preferred

SMALL = [
    tmsa_problem("tmsa", 2, 3, heads=2, head_dim=24),
    linear_problem("linear", 2, 21, width=48, heads=2),
    channel_problem("channel", 3, 20, 5),
    ternary_problem("ternary", 2, 9, 40, 24),
]


def test_published_problems_are_valid_and_include_what_is_compiled() -> None:
    problems = {problem.name: problem for problem in published(2)}
    assert all(problem.dims["B"] == 2 for problem in problems.values())
    assert problems["lit-xl-2048"].dims["T"] == 16384
    shapes = {(problem.op.name, problem.shapes) for problem in problems.values()}
    assert {(name, sizes) for name, cases in PUBLISHED_SIZES.items() for sizes, _ in cases} <= shapes


def test_work_of_known_sizes() -> None:
    diffit = tmsa_problem("diffit-256", 1, 16)
    assert diffit.flops == 2 * 2 * 16 * 256 * 256 * 72
    assert diffit.bytes_moved == 2 * (256 * 3456 + 3456 + 16 * 961 + 256 * 1152)
    assert linear_problem("lit", 1, 256).flops == 2 * 2 * 4 * 256 * 288 * 288


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_eager_and_our_kernels_agree(problem: ops.Problem) -> None:
    inputs = ops.example_inputs(problem, "cpu")
    expected = reference(problem.op, inputs, problem.attributes)
    assert error(EAGER[problem.op.name](*inputs, **problem.attributes), expected) < 1e-2
    for _, kernels in ops.forms(problem.op, problem.dims):
        tiles = [preferred(kernel, "sm90", ops.DTYPE) for kernel in kernels]
        assert error(ops.run_kernels(problem, kernels, tiles, inputs), expected) < 5e-3


def test_sdpa_is_the_same_attention() -> None:
    problem = SMALL[0]
    inputs = [x.float() for x in ops.example_inputs(problem, "cpu")]
    assert (
        error(SDPA["DexTMSA"](*inputs, **problem.attributes), reference(problem.op, inputs, problem.attributes)) < 1e-5
    )


def test_tuning_picks_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SMALL[1]
    inputs = ops.example_inputs(problem, "cpu")
    times = iter([3.0, 1.0, 2.0, 9.0, 8.0, 7.0])
    monkeypatch.setattr(ops, "time_of", lambda _: next(times))
    tiles, tried = ops.best_tiles(problem, problem.op.kernels, inputs, "sm90", quick=False)
    assert tiles == [ops.candidates(k, "sm90", ops.DTYPE)[i] for k, i in zip(problem.op.kernels, (1, 2), strict=True)]
    assert len(tried) == 6


def test_rates_and_summary() -> None:
    ceilings = {"bytes_per_second": 1e12, "flops_per_second": 1e14}
    rates = ops.rates(SMALL[0], 1e-6, ceilings)
    assert rates["share_of_bandwidth"] == pytest.approx(SMALL[0].bytes_moved / 1e6)
    entry = {
        "name": "tmsa",
        "results": {"eager": {"seconds": 2e-6}, "kernels": {"seconds": 1e-6}},
        "correct": False,
        "speedup_over_best_rival": 2.0,
    }
    assert ops.summary_line(entry).split() == [
        "tmsa",
        "x2.00",
        "eager",
        "2.0",
        "us",
        "kernels",
        "1.0",
        "us",
        "WRONG",
    ]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as exit_:
        ops.main([])
    assert exit_.value.code == 3
    assert "CUDA device" in capsys.readouterr().err
