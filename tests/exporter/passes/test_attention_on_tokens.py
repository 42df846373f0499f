"""Attention that is given its packed projection."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dexport.exporter.passes.attention_on_tokens import AttentionOnTokens
from tests.exporter.passes.model import initializer, model, node, ops, run, value
from tests.golden import assert_golden

TOKENS, HEADS, SIZE = 5, 2, 3
WIDTH = HEADS * SIZE
X = np.random.default_rng(0).standard_normal((2, TOKENS, 3 * WIDTH), dtype=np.float32)


def attention(order: tuple[int, ...] = (0, 1, 2), merge: tuple[int, ...] = (0, 2, 1, 3), **attributes) -> ir.Model:
    x, out = value("x", ("B", TOKENS, 3 * WIDTH)), value("out", ("B", TOKENS, WIDTH))
    by_heads = ("B", HEADS, TOKENS, SIZE)
    apart, turned = value("apart", ("B", TOKENS, 3 * HEADS, SIZE)), value("turned", ("B", 3 * HEADS, TOKENS, SIZE))
    thirds = [value(name, by_heads) for name in "qkv"]
    attended = value("attended", by_heads)
    behind = value("behind", tuple(by_heads[axis] for axis in merge))
    merged = value("merged", ("B", TOKENS, WIDTH))
    split_to, merge_to = (
        initializer(ir.Tensor(np.array(target), name=name))
        for name, target in (("split_to", [-1, TOKENS, 3 * HEADS, SIZE]), ("merge_to", [-1, TOKENS, WIDTH]))
    )
    nodes = [
        node("Reshape", [x, split_to], apart),
        node("Transpose", [apart], turned, perm=[0, 2, 1, 3]),
        ir.node("Split", [turned], attributes={"axis": 1, "num_outputs": 3}, outputs=thirds),
        node("Attention", [thirds[i] for i in order], attended, module="attn", **attributes),
        node("Transpose", [attended], behind, perm=merge),
        node("Reshape", [behind, merge_to], merged),
        node("Neg", [merged], out),
    ]
    return model([x], [out], nodes, [split_to, merge_to])


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.7}])
def test_transposes_to_heads_disappear(attributes: dict[str, float]) -> None:
    built = attention(**attributes)
    assert AttentionOnTokens()(built).modified
    assert ops(built) == ["Split", "Attention", "Neg"]
    assert built.graph[1].metadata_props["dexport.module"] == "attn"
    expected = run(attention(**attributes), {"x": X})[0]
    assert_golden(run(built, {"x": X})[0], expected)


@pytest.mark.parametrize("changed", [{"order": (1, 0, 2)}, {"merge": (0, 2, 1, 3), "order": (0, 2, 1)}])
def test_other_orders_stay(changed: dict[str, tuple[int, ...]]) -> None:
    assert not AttentionOnTokens()(attention(**changed)).modified


def test_heads_that_others_read_stay() -> None:
    """They would be made in both ways, as keys are that a graph returns."""
    built = attention()
    keys = value("keys", ("B", TOKENS, HEADS, SIZE))
    split = next(each for each in built.graph if each.op_type == "Split")
    built.graph.append(node("Transpose", [split.outputs[1]], keys, perm=[0, 2, 1, 3]))
    built.graph.outputs.append(keys)
    assert not AttentionOnTokens()(built).modified
