"""What the graphs are made of, against the official code and against formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.graphs.dico import DiCo
from dexport.graphs.diffit import DiffiT
from dexport.graphs.diffit_image import DiffiTImage
from dexport.graphs.dit import DiT
from dexport.graphs.guidance import Guided
from dexport.graphs.layers import sincos_table
from dexport.graphs.lit import LinearAttention, LiT
from dexport.graphs.terdit import ternarise
from dexport.plugins.ternary_matmul.packing import pack, unpack
from tests.golden import assert_golden, load_golden, load_keys


@pytest.mark.golden
def test_sincos_table_is_the_official_one() -> None:
    golden = load_golden("dit-s")
    side = golden.config["input_size"] // golden.config["patch_size"]
    table = sincos_table(golden.config["hidden_size"], side, side)
    assert_golden(table, golden.outputs["pos_embed_sincos"], 1e-6)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "to_ternary"), [("terdit-packed", unpack), ("terdit-master", ternarise)])
def test_ternary_values_are_the_official_ones(name: str, to_ternary: Callable[[Tensor], Tensor]) -> None:
    golden = load_golden(name)
    example = next(value for key, value in golden.outputs.items() if key.endswith("example"))
    assert torch.equal(to_ternary(golden.weights["layers.0.attention.wq.weight"]), example)


def test_packing_four_ternary_values_to_a_byte_is_the_official_layout() -> None:
    golden = load_golden("terdit-packed")
    packed = [weight for weight in golden.weights.values() if weight.dtype == torch.uint8]
    assert packed and all(torch.equal(pack(unpack(weight)), weight) for weight in packed)


@pytest.mark.parametrize(
    ("module_class", "config", "keys"),
    [
        (DiT, {}, "DiT-XL-2-256"),
        (DiCo, {"hidden_size": 416, "depth": [9, 9, 10, 9, 9], "mlp_ratio": 2}, "DiCo-XL"),
        (DiffiT, {"depth": 28}, "DiffiT-256"),
    ],
)
def test_state_dict_has_exactly_the_official_keys_and_shapes(module_class, config, keys) -> None:
    with torch.device("meta"):
        state = module_class(**config).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == load_keys(keys)


def test_dico_takes_non_square_latents() -> None:
    model = DiCo(hidden_size=4, depth=[1, 1, 1, 1, 1], mlp_ratio=2, num_classes=3).eval()
    out = model(torch.randn(2, 4, 8, 20), torch.tensor([0.5, 999.0]), torch.tensor([0, 3]))
    assert out.shape == (2, 8, 8, 20)


def test_without_learned_sigma_or_dropout_the_shapes_follow() -> None:
    model = DiT(
        input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3, class_dropout_prob=0.0, learn_sigma=False
    )
    assert model.y_embedder.embedding_table.weight.shape == (3, 16)
    assert model(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.tensor([0, 2])).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("module_class", "config", "named"),
    [
        (DiT, {"input_size": 9}, "patch_size"),
        (DiT, {"hidden_size": 30, "num_heads": 4}, "num_heads"),
        (DiCo, {"depth": [1, 2]}, "five"),
        (DiCo, {"hidden_size": 3}, "even"),
    ],
)
def test_impossible_configurations_name_the_argument(module_class, config, named) -> None:
    with pytest.raises(ValueError, match=named):
        module_class(**config)


def test_diffit_index_is_the_one_that_official_checkpoints_carry() -> None:
    golden = load_golden("diffit-latent")
    index = DiffiT(**golden.config).blocks[0].attn.relative_position_index
    assert torch.equal(index, golden.weights["blocks.0.attn.relative_position_index"])


@pytest.mark.parametrize(("input_size", "power"), [(16, 4.0), (32, 4.0), (40, None)])
def test_diffit_ramps_the_guidance_up_to_a_latent_of_32(input_size: int, power: float | None) -> None:
    guided = resolve(find_recipe("diffit-256"), {"input_size": input_size}, graphs=["guided"]).wrap(torch.nn.Identity())
    assert (guided.channels, guided.power) == (3, power)


def test_power_cosine_guidance_grows_from_one_to_the_scale() -> None:
    guidance = Guided(torch.nn.Identity(), 0, power=4.0)
    strength = guidance.scale(torch.tensor([1000.0, 500.0, 0.0]), torch.tensor(4.4)).flatten()
    torch.testing.assert_close(strength[[0, 2]], torch.tensor([1.0, 4.4]))
    assert 1 < strength[1] < 4.4


def test_lit_attention_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    layer = LinearAttention(hidden_size=12, num_heads=3, grid_size=4).eval()
    x = torch.randn(2, 16, 12)
    out = torch.zeros(2, 16, 12)
    k, v = layer.kv(x).chunk(2, dim=2)
    q, k = torch.relu(layer.q(x)) + 1e-6, torch.relu(k) + 1e-6
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = q[..., part] @ k[..., part].transpose(1, 2)
        out[..., part] = (weights / (weights.sum(2, keepdim=True) + 16e-6)) @ v[..., part]
        plane = v[..., part].transpose(1, 2).reshape(2, 4, 4, 4)
        out[..., part] += layer.dwc(plane).flatten(2).transpose(1, 2)
    with torch.no_grad():
        assert_golden(layer(x), layer.proj(out))


def test_lit_differs_from_dit_in_its_attention_only() -> None:
    config = {"input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    dit, lit = (set(cls(**config).state_dict()) for cls in (DiT, LiT))
    assert {name for name in dit ^ lit if ".attn." not in name} == set()


def test_image_space_diffit_denoises_little_noise_to_the_image_itself() -> None:
    """EDM's preconditioning: at sigma -> 0 the skip connection is all there is."""
    torch.manual_seed(0)
    model = DiffiTImage(input_size=16, channels=32, channel_mult=[1, 2], num_blocks=[1, 1], window=4).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = model(x, torch.tensor([1e-5, 40.0]))
    assert out.shape == x.shape
    torch.testing.assert_close(out[0], x[0], atol=1e-3, rtol=0)
    assert torch.isfinite(out).all()


def test_image_space_windows_are_a_partition() -> None:
    model = DiffiTImage(input_size=16, channels=32, channel_mult=[1, 2], num_blocks=[1, 1], window=4)
    block = model.net.encoder[0][0]
    h = torch.randn(2, 32, 16, 16)
    windows = block._to_windows(h, 4, 4)
    assert windows.shape == (2 * 16, 16, 32)
    assert torch.equal(windows[5, 0], h[0, :, 4, 4])
    assert torch.equal(block._from_windows(windows, 4, 4), h)
