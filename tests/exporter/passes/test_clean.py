"""The cleaning passes, one by one: the rewrite, what must not be rewritten, and the values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from dexport.exporter.passes.fold_constants import INPUT_LIMIT, FoldConstants
from dexport.exporter.passes.fold_weight_transposes import FoldWeightTransposes
from dexport.exporter.passes.name_by_module import NameByModule
from dexport.exporter.passes.remove_redundant import RemoveRedundant
from dexport.exporter.passes.share_constants import ShareConstants
from dexport.exporter.passes.static_reshape import StaticReshape
from tests.exporter.passes.model import Weight, initializer, model, node, ops, run, value

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4), dtype=np.float32)


def constant(name: str, *numbers: int) -> ir.Value:
    return initializer(ir.Tensor(np.array(numbers, dtype=np.int64), name=name))


@given(permutation=st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_weight_transposes_are_folded_lazily(permutation: list[int]) -> None:
    weight = Weight("w", X)
    w, x = initializer(weight), value("x", np.transpose(X, permutation).shape)
    t, out = value("t", x.shape), value("out", x.shape)
    built = model([x], [out], [node("Transpose", [w], t, perm=list(permutation)), node("Add", [x, t], out)], [w])
    assert FoldWeightTransposes()(built).modified
    assert ops(built) == ["Add"]
    assert list(built.graph.initializers) == [str(built.graph[0].inputs[1].name)]
    assert weight.reads == 0
    np.testing.assert_array_equal(
        run(built, {"x": np.zeros(np.transpose(X, permutation).shape, np.float32)})[0], np.transpose(X, permutation)
    )


def test_a_weight_used_both_ways_keeps_both_versions() -> None:
    w = initializer(Weight("w", X[0]))
    t, out = value("t", (4, 3)), value("out", (3, 3))
    built = model([], [out], [node("Transpose", [w], t, perm=[1, 0]), node("MatMul", [w, t], out)], [w])
    FoldWeightTransposes()(built)
    assert set(built.graph.initializers) == {"w", "w.T"}
    np.testing.assert_allclose(run(built, {})[0], X[0] @ X[0].T, rtol=1e-5)


def test_transposes_of_activations_stay() -> None:
    x, out = value("x", (2, 3, 4)), value("out", (4, 3, 2))
    assert not FoldWeightTransposes()(model([x], [out], [node("Transpose", [x], out, perm=[2, 1, 0])])).modified


def test_constant_folding_does_not_touch_weights() -> None:
    array = np.ones((INPUT_LIMIT + 1, 1), dtype=np.float32)
    weight = Weight("w", array)
    w, t, out = initializer(weight), value("t", (1, INPUT_LIMIT + 1)), value("out", (1, INPUT_LIMIT + 1))
    built = model([], [out], [node("Transpose", [w], t, perm=[1, 0]), node("Neg", [t], out)], [w])
    FoldConstants()(built)
    assert ops(built) == ["Transpose", "Neg"]
    assert weight.reads == 0


def reshape_model(out_shape: tuple[int | str, ...]) -> ir.Model:
    """Reshape whose target is computed from the input's shape."""
    x, out = value("x", ("B", 3, 4)), value("out", out_shape)
    size, target = value("size", (1,), ir.DataType.INT64), value("target", (2,), ir.DataType.INT64)
    nodes = [
        ir.node("Shape", [x], attributes={"start": 0, "end": 1}, outputs=[size]),
        node("Concat", [size, constant("twelve", 12)], target, axis=0),
        node("Reshape", [x, target], out),
    ]
    return model([x], [out], nodes, [nodes[1].inputs[1]])


def test_reshape_targets_become_constants() -> None:
    built = reshape_model(("B", 12))
    assert StaticReshape()(built).modified
    assert built.graph.initializers["reshape_to_Bx12"].const_value.numpy().tolist() == [-1, 12]
    np.testing.assert_array_equal(run(built, {"x": X})[0], X.reshape(2, 12))


def test_reshape_with_two_symbolic_dimensions_stays_computed() -> None:
    assert not StaticReshape()(reshape_model(("B", "N"))).modified


def test_equal_constants_are_shared_and_weights_are_not_read() -> None:
    weights = [Weight("w1", X), Weight("w2", X)]
    small = [initializer(ir.Tensor(np.float32(2), name=name)) for name in ("a", "b")]
    other = initializer(ir.Tensor(np.array(2, dtype=np.int64), name="c"))
    x, values = value("x", X.shape), [value(f"v{i}", X.shape) for i in range(4)]
    lazy = [initializer(w) for w in weights]
    nodes = [
        node("Add", [x, small[0]], values[0]),
        node("Add", [values[0], small[1]], values[1]),
        node("Mul", [values[1], lazy[0]], values[2]),
        node("Mul", [values[2], lazy[1]], values[3]),
    ]
    built = model([x], [values[3]], nodes, [*small, other, *lazy])
    assert ShareConstants()(built).modified
    assert set(built.graph.initializers) == {"a", "c", "w1", "w2"}
    assert [w.reads for w in weights] == [0, 0]
    np.testing.assert_allclose(run(built, {"x": X})[0], (X + 4) * X * X, rtol=1e-6)


HALF = ir.DataType.FLOAT16


def chain(*steps: tuple[str, dict, tuple[int | str, ...], ir.DataType]) -> ir.Model:
    """x through unary nodes to a final Neg, which is never redundant."""
    x = value("x", ("B", 3, 4))
    nodes, last, weights = [], x, []
    for index, (op, attributes, shape, dtype) in enumerate(steps):
        inputs = [last]
        for extra in ("shape", "starts", "ends"):
            if extra in attributes:
                inputs.append(constant(f"{extra}{index}", *attributes[extra]))
                weights.append(inputs[-1])
        plain = {k: v for k, v in attributes.items() if k not in ("shape", "starts", "ends")}
        last = value(f"v{index}", shape, dtype)
        nodes.append(node(op, inputs, last, **plain))
    out = value("out", last.shape, last.dtype)
    return model([x], [out], [*nodes, node("Neg", [last], out)], weights)


S = ("B", 3, 4)
FULL = np.iinfo(np.int64).max


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([("Cast", {"to": 1}, S, ir.DataType.FLOAT)], []),
        ([("Cast", {"to": 10}, S, HALF)], ["Cast"]),
        ([("Cast", {"to": 10}, S, HALF), ("Cast", {"to": 1}, S, ir.DataType.FLOAT)], ["Cast", "Cast"]),
        ([("Cast", {"to": 11}, S, ir.DataType.DOUBLE), ("Cast", {"to": 1}, S, ir.DataType.FLOAT)], []),
        ([("Identity", {}, S, ir.DataType.FLOAT)], []),
        ([("Reshape", {"shape": [-1, 3, 4]}, S, ir.DataType.FLOAT)], []),
        ([("Reshape", {"shape": [-1, 12]}, ("B", 12), ir.DataType.FLOAT)], ["Reshape"]),
        ([("Transpose", {"perm": [0, 1, 2]}, S, ir.DataType.FLOAT)], []),
        (
            [
                ("Transpose", {"perm": [2, 0, 1]}, (4, "B", 3), ir.DataType.FLOAT),
                ("Transpose", {"perm": [1, 2, 0]}, S, ir.DataType.FLOAT),
            ],
            [],
        ),
        (
            [
                ("Transpose", {"perm": [2, 0, 1]}, (4, "B", 3), ir.DataType.FLOAT),
                ("Transpose", {"perm": [2, 0, 1]}, (3, 4, "B"), ir.DataType.FLOAT),
            ],
            ["Transpose", "Transpose"],
        ),
        ([("Slice", {"starts": [0], "ends": [FULL]}, S, ir.DataType.FLOAT)], []),
        ([("Slice", {"starts": [1], "ends": [FULL]}, ("B2", 3, 4), ir.DataType.FLOAT)], ["Slice"]),
    ],
)
def test_only_what_changes_nothing_is_removed(steps, left) -> None:
    before = run(chain(*steps), {"x": X})[0]
    built = chain(*steps)
    RemoveRedundant()(built)
    # A pair that cancels leaves its first node without a reader; removing that is another pass's work.
    built = common.RemoveUnusedNodesPass()(built).model
    assert ops(built) == [*left, "Neg"]
    np.testing.assert_array_equal(run(built, {"x": X})[0], before)


def test_nodes_are_named_after_their_module_and_orphans_after_their_input() -> None:
    x, a, b, c = (value(name, (2,)) for name in "xabc")
    nodes = [
        node("Neg", [x], a, module="blocks.0.mlp"),
        node("Neg", [a], b, module="blocks.0.mlp"),
        node("Abs", [b], c),
    ]
    built = model([x], [c], nodes)
    NameByModule()(built)
    assert [n.name for n in built.graph] == ["blocks.0.mlp/Neg", "blocks.0.mlp/Neg_1", "blocks.0.mlp/Abs"]
    assert [n.outputs[0].name for n in built.graph] == ["blocks.0.mlp/Neg", "blocks.0.mlp/Neg_1", "c"]
