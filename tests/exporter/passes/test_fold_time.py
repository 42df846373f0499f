"""Tables in place of what depends on time alone: what is folded, what must not be, and equal values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from dexport.errors import InputError
from dexport.exporter.passes.fold_time import TABLE, TIMES, FoldTime
from tests.exporter.passes.model import FLOAT, Weight, initializer, model, node, ops, run, value

RNG = np.random.default_rng(0)
SCHEDULE = np.array([0.0, 0.25, 499.5, 999.0], np.float32)
WIDTH = 3
LOOK_UP = ["Unsqueeze", "Sub", "Abs", "ArgMin", "Gather"]
X = RNG.standard_normal((4, WIDTH), dtype=np.float32)


def axis(number: int) -> ir.Value:
    return initializer(ir.Tensor(np.array([number]), name=f"axis{number}"))


def embedding(t: ir.Value, weight: ir.Value, batch: str = "B") -> tuple[ir.Value, list[ir.Node], list[ir.Value]]:
    """sin(t * w), (B, WIDTH)."""
    ones = axis(1)
    column, scaled, embedded = (value(name, (batch, n)) for name, n in (("c", 1), ("s", WIDTH), ("e", WIDTH)))
    nodes = [
        node("Unsqueeze", [t, ones], column, module="t_embedder"),
        node("Mul", [column, weight], scaled, module="t_embedder"),
        node("Sin", [scaled], embedded, module="t_embedder"),
    ]
    return embedded, nodes, [ones, weight]


def conditioned() -> tuple[ir.Model, Weight]:
    """x + sin(t * w)."""
    x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
    weight = Weight("w", RNG.standard_normal(WIDTH, dtype=np.float32))
    embedded, nodes, weights = embedding(t, initializer(weight))
    nodes.append(node("Add", [x, embedded], out))
    return model([x, t], [out], nodes, weights), weight


def folded(build: Callable[[], ir.Model], keep: tuple[str, ...] = ()) -> ir.Model:
    built = build()
    FoldTime("t", SCHEDULE, keep)(built)
    return built


def assert_equal_at_every_time(build: Callable[[], ir.Model], **others: np.ndarray) -> None:
    plain, tabled = build(), folded(build)
    for order in (range(4), (3, 1, 1, 0)):
        feed = {"x": X, "t": SCHEDULE[list(order)], **others}
        for wanted, got in zip(run(plain, feed), run(tabled, feed), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_an_embedding_becomes_a_table() -> None:
    built, weight = conditioned()
    assert FoldTime("t", SCHEDULE)(built).modified
    assert ops(built) == [*LOOK_UP, "Add"]
    assert weight.reads == 0
    assert set(built.graph.initializers) == {TIMES, "time_table/axis", f"e{TABLE}"}
    assert built.graph.initializers[f"e{TABLE}"].shape == ir.Shape((4, WIDTH))
    row = built.graph[-1].inputs[1]
    assert row is not None
    assert (row.name, row.shape, row.dtype) == ("e", ir.Shape(("B", WIDTH)), FLOAT)


def test_values_are_equal_at_every_time_in_any_order() -> None:
    weight = RNG.standard_normal(WIDTH, dtype=np.float32)

    def build() -> ir.Model:
        x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
        embedded, nodes, weights = embedding(t, initializer(Weight("w", weight)))
        return model([x, t], [out], [*nodes, node("Mul", [x, embedded], out)], weights)

    assert_equal_at_every_time(build)


def test_what_depends_on_labels_stays() -> None:
    x, t, y = value("x", ("B", WIDTH)), value("t", ("B",)), value("y", ("B", WIDTH))
    c, act, out = (value(name, ("B", WIDTH)) for name in ("cond", "act", "out"))
    embedded, nodes, weights = embedding(t, initializer(Weight("w", X[0])))
    nodes += [node("Add", [embedded, y], c), node("Tanh", [c], act), node("Add", [x, act], out)]
    built = model([x, t, y], [out], nodes, weights)
    FoldTime("t", SCHEDULE)(built)
    assert ops(built) == [*LOOK_UP, "Add", "Tanh", "Add"]


def test_arithmetic_of_weights_goes_into_the_table() -> None:
    def build() -> ir.Model:
        x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
        shifted = value("shifted", (WIDTH,))
        weight, one = initializer(Weight("v", X[1])), initializer(ir.Tensor(np.float32([1]), name="one"))
        embedded, nodes, weights = embedding(t, shifted)
        nodes = [node("Add", [weight, one], shifted), *nodes, node("Add", [x, embedded], out)]
        return model([x, t], [out], nodes, [weights[0], weight, one])

    assert ops(folded(build)) == [*LOOK_UP, "Add"]
    assert_equal_at_every_time(build)


def test_weights_that_others_read_stay() -> None:
    def build() -> ir.Model:
        x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
        weight, scaled = initializer(Weight("w", X[0])), value("scaled", ("B", WIDTH))
        embedded, nodes, weights = embedding(t, weight)
        nodes += [node("Mul", [x, weight], scaled), node("Add", [scaled, embedded], out)]
        return model([x, t], [out], nodes, weights)

    assert "w" in folded(build).graph.initializers
    assert_equal_at_every_time(build)


def test_an_output_that_depends_on_time_alone_keeps_its_name() -> None:
    def build() -> ir.Model:
        x, t = value("x", ("B", WIDTH)), value("t", ("B",))
        embedded, nodes, weights = embedding(t, initializer(Weight("w", X[0])))
        total = value("total", ("B", WIDTH))
        return model([x, t], [embedded, total], [*nodes, node("Add", [x, embedded], total)], weights)

    assert [output.name for output in folded(build).graph.outputs] == ["e", "total"]
    assert_equal_at_every_time(build)


def test_a_doubled_batch_has_the_rows_twice() -> None:
    """As guidance that is part of the graph doubles it: the time, or what was computed from it already."""

    def build() -> ir.Model:
        x, t = value("x", ("B", WIDTH)), value("t", ("B",))
        both, strength, out = value("both", ("2*B",)), value("strength", ("B",)), value("out", ("2*B", WIDTH))
        half, doubled, more = value("half", ("B",)), value("doubled", ("2*B",)), value("more", ("2*B", WIDTH))
        column = value("column", ("2*B", 1))
        embedded, nodes, weights = embedding(both, initializer(Weight("w", X[0])), "2*B")
        xs, sums = value("xs", ("2*B", WIDTH)), value("sums", ("B",))
        nodes = [
            node("Concat", [t, t], both, axis=0),
            node("Concat", [x, x], xs, axis=0),
            *nodes,
            node("Add", [xs, embedded], more),
            node("Cos", [t], strength),
            node("Concat", [strength, strength], doubled, axis=0),
            node("Unsqueeze", [doubled, weights[0]], column),
            node("Mul", [more, column], out),
            node("ReduceSum", [x, weights[0]], half, keepdims=0),
            node("Add", [strength, half], sums),
        ]
        return model([x, t], [out, sums], nodes, weights)

    built = folded(build)
    assert [ops(built).count(op) for op in ("ArgMin", "Concat", "Gather")] == [1, 2, 3]
    assert not {"Cos", "Sin"} & set(ops(built))
    assert_equal_at_every_time(build)


def test_kept_modules_are_left_alone() -> None:
    built, _ = conditioned()
    assert not FoldTime("t", SCHEDULE, keep=("t_embedder",))(built).modified
    assert ops(built) == ["Unsqueeze", "Mul", "Sin", "Add"]


def test_shapes_are_no_functions_of_time() -> None:
    x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
    size, wide = value("size", (1,), ir.DataType.INT64), value("wide", ("B", WIDTH))
    column, width = value("c", ("B", 1)), initializer(ir.Tensor(np.array([WIDTH]), name="width"))
    target = value("target", (2,), ir.DataType.INT64)
    nodes = [
        node("Unsqueeze", [t, axis(1)], column),
        node("Shape", [t], size),
        node("Concat", [size, width], target, axis=0),
        node("Expand", [column, target], wide),
        node("Add", [x, wide], out),
    ]
    built = model([x, t], [out], nodes, [nodes[0].inputs[1], width])  # type: ignore[list-item]
    FoldTime("t", SCHEDULE)(built)
    assert [op for op in ops(built) if op not in LOOK_UP] == ["Shape", "Concat", "Expand", "Add"]
    np.testing.assert_allclose(run(built, {"x": X, "t": SCHEDULE})[0], X + SCHEDULE[:, None])


def test_what_mixes_the_times_of_a_batch_is_refused_when_its_table_is_read() -> None:
    x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
    mixed, first = value("mixed", ("B", WIDTH)), initializer(ir.Tensor(np.array(0), name="first"))
    embedded, nodes, weights = embedding(t, initializer(Weight("w", X[0])))
    nodes += [node("CumSum", [embedded, first], mixed), node("Add", [x, mixed], out)]
    built = model([x, t], [out], nodes, [*weights, first])
    FoldTime("t", SCHEDULE)(built)
    table = built.graph.initializers[f"mixed{TABLE}"].const_value
    assert table is not None
    with pytest.raises(InputError, match="mixed mixes the times of a batch"):
        table.numpy()


def test_a_graph_without_time_dependence_is_as_it_was() -> None:
    x, t, out = value("x", ("B", WIDTH)), value("t", ("B",)), value("out", ("B", WIDTH))
    built = model([x, t], [out], [node("Tanh", [x], out)])
    assert not FoldTime("t", SCHEDULE)(built).modified
    assert ops(built) == ["Tanh"]
