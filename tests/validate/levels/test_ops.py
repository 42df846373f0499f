"""The level ``op``: clean functions pass, a fault in a function's body is found."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import dexport
from dexport.bundle import load_bundle
from dexport.validate.levels.ops import check_ops
from dexport.validate.validate import validate
from tests.bundles import NARROW, build_narrow
from tests.validate.faults import rehash


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {**NARROW, "depth": 2}
    path = tmp_path_factory.mktemp("lit") / "bundle"
    dexport.build("lit-fashion", path, settings=settings, profile="ci", parity=False, precision="fp16")
    return path


def test_nodes_that_are_alike_are_one_check(linear: Path) -> None:
    report = validate(load_bundle(linear), ["op"])
    assert report.passed
    assert report.ops is not None
    (check,) = report.ops.checks
    assert (check.op, check.nodes, check.dtype, check.module) == ("DexLinearAttention", 2, "float16", "blocks.0.attn")
    assert check.shapes == ((2, 64, 16),) * 3
    assert check.metrics.relative_l2 < 2e-3  # exactly 0 on some processors
    assert [gate.metric for gate in report.gates] == ["op_l2", "block_l2", "altered_blocks"]
    assert report.blocks[""][0].path == "x_embedder"


def test_a_fault_in_a_body_is_found(linear: Path) -> None:
    model = ir.load(linear / "model.onnx")
    for function in model.functions.values():
        for node in function:
            if node.op_type == "Relu":
                node.op_type = "Abs"
    ir.save(model, linear / "model.onnx")
    rehash(linear)
    report = validate(load_bundle(linear), ["op"])
    assert report.verdict == "failed"
    assert "DexLinearAttention of blocks.0.attn" in report.gates[0].where


def test_bfloat16_is_not_run(tmp_path: Path) -> None:
    path = build_narrow(tmp_path / "bf16", "lit-fashion", precision="bf16")
    report = check_ops("", path / "model.onnx")
    assert report.checks == ()
    assert report.not_run == ("DexLinearAttention in bfloat16: ONNX Runtime has no kernels for it on a CPU",)
    result = validate(load_bundle(path), ["op"])
    assert [gate.metric for gate in result.gates] == ["block_l2", "altered_blocks"]


def test_a_bundle_without_ops_says_so(plain: Path) -> None:
    report = validate(load_bundle(plain), ["op", "forward"])
    assert report.passed
    assert "op: no custom ops" in report.not_run
