"""What both halves of a doubled batch share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dexport.exporter.passes.share_halves import ShareHalves
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value
from tests.golden import assert_golden

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 4), dtype=np.float32)
ROWS = ("B", 4)
BOTH = ("2*B", 4)


def doubled(op: str, *operands: ir.Value, shape: tuple[int | str, ...] = BOTH, **attributes: object) -> ir.Model:
    """One operator of ``Concat(x, x)``, and a sum with rows that differ."""
    x, y, out = value("x", ROWS), value("y", BOTH), value("out", BOTH)
    both, result = value("both", BOTH), value("result", shape)
    nodes = [
        node("Concat", [x, x], both, axis=0),
        node(op, [both, *operands], result, module="embed", **attributes),
        node("Add", [result, y], out),
    ]
    return model([x, y], [out], nodes, operands)


def feed() -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal((rows, 4), dtype=np.float32) for name, rows in (("x", 3), ("y", 6))}


def weight(array: np.ndarray = W, name: str = "w") -> ir.Value:
    return initializer(Weight(name, array))


@pytest.mark.parametrize(
    ("op", "operands", "attributes"),
    [
        ("Sigmoid", (), {}),
        ("Mul", (W[:1],), {}),
        ("MatMul", (W,), {}),
        ("Gemm", (W, W[0]), {"transB": 1}),
        ("LayerNormalization", (W[0],), {"axis": -1}),
        ("Transpose", (), {"perm": [0, 1]}),
    ],
)
def test_one_half_is_computed(op: str, operands: tuple[np.ndarray, ...], attributes: dict[str, object]) -> None:
    def build() -> ir.Model:
        return doubled(op, *(weight(a, f"w{n}") for n, a in enumerate(operands)), **attributes)

    built, inputs = build(), feed()
    assert ShareHalves()(built).modified
    assert ops(built) == [op, "Concat", "Add"]
    assert built.graph[0].outputs[0].shape == ROWS
    assert built.graph[1].metadata_props["dexport.module"] == "embed"
    assert all(v.const_value.reads == 0 for v in built.graph.initializers.values())
    assert_golden(run(built, inputs)[0], run(build(), inputs)[0])


def test_a_chain_ends_where_the_halves_differ() -> None:
    x, y, out = value("x", ROWS), value("y", BOTH), value("out", BOTH)
    chain = [value(name, BOTH) for name in ("both", "cos", "sin", "sum")]
    joined, wide = value("joined", ("2*B", 8)), weight(RNG.standard_normal((8, 4), dtype=np.float32))
    product = value("product", BOTH)
    nodes = [
        node("Concat", [x, x], chain[0], axis=0),
        node("Cos", [chain[0]], chain[1]),
        node("Sin", [chain[0]], chain[2]),
        node("Concat", [chain[1], chain[2]], joined, axis=1),
        node("MatMul", [joined, wide], product),
        node("Add", [product, y], chain[3]),
        node("Sigmoid", [chain[3]], out),
    ]
    built, inputs = model([x, y], [out], nodes, [wide]), feed()
    expected = run(built.clone(), inputs)[0]
    ShareHalves()(built)
    assert ops(built) == ["Cos", "Sin", "Concat", "MatMul", "Concat", "Add", "Sigmoid"]
    np.testing.assert_array_equal(run(built, inputs)[0], expected)


@pytest.mark.parametrize(
    ("op", "operands", "attributes"),
    [
        ("Add", (RNG.standard_normal((6, 4), dtype=np.float32),), {}),  # a row for each sample of both halves
        ("Softmax", (), {"axis": 0}),
        ("LayerNormalization", (np.ones((6, 4), np.float32),), {"axis": 0}),
        ("Gemm", (np.ones((6, 4), np.float32),), {"transA": 1}),
    ],
)
def test_what_mixes_samples_stays(op: str, operands: tuple[np.ndarray, ...], attributes: dict[str, object]) -> None:
    assert not ShareHalves()(doubled(op, *(weight(a) for a in operands), **attributes)).modified


def test_different_halves_stay() -> None:
    x, z, both, out = value("x", ROWS), value("z", ROWS), value("both", BOTH), value("out", BOTH)
    built = model([x, z], [out], [node("Concat", [x, z], both, axis=0), node("Sin", [both], out)])
    assert not ShareHalves()(built).modified
