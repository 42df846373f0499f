"""Halton-MaskGIT's transformer: what its configurations may and may not be. The goldens are in test_official.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dexport.graphs.halton_maskgit import HaltonMaskGIT
from dexport.graphs.halton_text import HaltonTextMaskGIT
from tests.golden import assert_golden, load_golden

SMALL: dict[str, Any] = {
    "input_size": 4,
    "hidden_dim": 22,
    "codebook_size": 9,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 40,
    "nclass": 3,
}


def model(**changes: Any) -> HaltonMaskGIT:
    torch.manual_seed(0)
    return HaltonMaskGIT(**{**SMALL, **changes}).eval()


@pytest.mark.golden
def test_a_dropped_label_is_the_null_label() -> None:
    golden = load_golden("halton-transformer")
    network = HaltonMaskGIT(**golden.config).eval()
    network.load_state_dict(golden.weights)
    labels = torch.where(golden.inputs["drop_label"], golden.config["nclass"], golden.inputs["labels"])
    with torch.no_grad():
        logits = network(golden.inputs["codes"], labels, torch.zeros(3, dtype=torch.bool))
    assert_golden(logits, golden.outputs["logits"])


def test_heads_may_leave_channels_out() -> None:
    """22 channels in 4 heads: 5 each."""
    attention = model().transformer.layers[0].attn
    assert attention.wq.weight.shape == (20, 22) and attention.wo.weight.shape == (22, 20)


def test_queries_are_normalised_over_all_heads_together() -> None:
    attention = model().transformer.layers[0].attn
    x = torch.randn(2, 5, 22)
    q, k, v = (layer(x) for layer in (attention.wq, attention.wk, attention.wv))
    q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in (q, k))
    heads = [
        (F.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 5**0.5, dim=-1) @ v[..., part])
        for part in (slice(5 * head, 5 * head + 5) for head in range(4))
    ]
    with torch.no_grad():
        assert_golden(attention(x), attention.wo(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize(("mlp_dim", "width"), [(40, 256), (384, 256), (386, 512), (2048, 1536)])
def test_the_width_of_swiglu_is_rounded_up(mlp_dim: int, width: int) -> None:
    assert model(mlp_dim=mlp_dim).transformer.layers[0].ff.w1.weight.shape[0] == width


@pytest.mark.parametrize("register", [0, 1, 3])
def test_registers_see_and_are_seen_and_have_no_logits(register: int) -> None:
    network = model(register=register)
    codes, labels = torch.randint(0, 10, (2, 4, 4)), torch.tensor([0, 3])
    with torch.no_grad():
        before = network(codes, labels, torch.tensor([False, False]))
        if network.reg_tokens is not None:
            network.reg_tokens.weight.add_(1.0)
        after = network(codes, labels, torch.tensor([False, False]))
    assert before.shape == (2, 16, 10)
    assert torch.equal(before, after) == (register == 0)
    assert ("reg_tokens.weight" in network.state_dict()) == (register > 0)


def test_samples_of_a_batch_do_not_meet_and_the_table_is_the_head() -> None:
    network = model()
    codes, labels, drop = torch.randint(0, 10, (3, 4, 4)), torch.tensor([0, 3, 2]), torch.tensor([False, False, True])
    with torch.no_grad():
        assert_golden(network(codes, labels, drop)[1:2], network(codes[1:2], labels[1:2], drop[1:2]))
    assert network.head.weight is network.tok_emb.weight


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"proj": 4}, "proj 4"), ({"heads": 5}, "heads 5"), ({"depth": 0}, "depth"), ({"proj": 0}, "proj 0")],
)
def test_impossible_text_networks_name_the_argument(changes: dict[str, int], named: str) -> None:
    config = {**load_golden("halton-text").config, **changes}
    with pytest.raises(ValueError, match=named):
        HaltonTextMaskGIT(**config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"proj": 2}, "proj 2"),
        ({"heads": 0}, "heads 0"),
        ({"heads": 23}, "heads 23"),
        ({"depth": 0}, "depth 0"),
        ({"register": -1}, "register -1"),
        ({"codebook_size": 0}, "codebook_size 0"),
        ({"nclass": 0}, "nclass 0"),
        ({"input_size": 0}, "input_size 0"),
        ({"mlp_dim": 1}, "mlp_dim 1"),
    ],
)
def test_impossible_configurations_name_the_argument(changes: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model(**changes)
