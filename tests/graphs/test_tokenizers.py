"""The tokenizers' halves against the official classes' keys, and what their configurations may and may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dexport.graphs.compvis import Encoder, Level, Nearest, ResnetBlock
from dexport.graphs.llamagen_vq import VqDecoder, VqEncoder
from dexport.graphs.mage_vqgan import VqganDecoder, VqganEncoder
from dexport.graphs.mar_vae import KlDecoder, KlEncoder
from tests.golden import load_keys

TINY = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
TINY_VQ = {**TINY, "z_channels": 16, "codebook_size": 40, "codebook_embed_dim": 6}
TINY_VQGAN = {**TINY, "z_channels": 16, "embed_dim": 16, "n_embed": 40}
TINY_KL = {**TINY, "embed_dim": 5}
RECORD = {"quantize.codebook_used": [65536]}
"""What the training of LlamaGen's tokenizer leaves in the file."""


@pytest.mark.parametrize(
    ("halves", "name", "prefix", "besides"),
    [
        ((VqEncoder, VqDecoder), "Halton-VQ16-LlamaGen", "", RECORD),
        ((VqganEncoder, VqganDecoder), "MAGE-ViT-B", "vqgan.", {}),
        ((KlEncoder, KlDecoder), "MAR-KL16", "", {}),
    ],
)
def test_the_halves_together_have_exactly_the_official_keys_and_shapes(halves, name, prefix, besides) -> None:
    with torch.device("meta"):
        state = {key: list(tensor.shape) for half in halves for key, tensor in half().state_dict().items()}
    official = {key.removeprefix(prefix): shape for key, shape in load_keys(name).items() if key.startswith(prefix)}
    assert {**state, **besides} == official


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [{}, {"ch_mult": [1, 1, 2], "num_res_blocks": 2}, {"ch_mult": [2]}, {"in_channels": 1}, {"ch": 64}]
)
def test_shapes_follow_the_configuration(config: dict[str, Any]) -> None:
    factor = 2 ** (len({**TINY, **config}["ch_mult"]) - 1)
    image = torch.rand(2, config.get("in_channels", 3), 4 * factor, 2 * factor)
    codes = VqEncoder(**{**TINY_VQ, **config})(image)
    assert (codes.shape, codes.dtype) == ((2, 4, 2), torch.int64)
    assert VqDecoder(**{**TINY_VQ, **config})(codes).shape == (2, 3, 4 * factor, 2 * factor)
    ids = VqganEncoder(**{**TINY_VQGAN, **config})(image)
    assert (ids.shape, ids.dtype) == ((2, 8), torch.int64)
    assert VqganDecoder(**{**TINY_VQGAN, **config}, grid=[4, 2])(ids).shape == (2, 3, 4 * factor, 2 * factor)
    mean, std = KlEncoder(**{**TINY_KL, **config})(image)
    assert mean.shape == std.shape == (2, 5, 4, 2)
    assert KlDecoder(**{**TINY_KL, **config})(mean).shape == (2, 3, 4 * factor, 2 * factor)


def attended(half: nn.Module) -> list[int]:
    """The levels that have attention, as the network numbers them."""
    levels = [part for part in half.modules() if isinstance(part, Level)]
    return [index for index, level in enumerate(levels) if len(level.attn)]


def test_attention_is_at_the_lowest_resolution_of_both_halves_of_llamagen_s() -> None:
    config = {**TINY_VQ, "ch_mult": [1, 1, 2]}
    assert attended(VqEncoder(**config)) == [2]
    assert attended(VqDecoder(**config)) == [0], "its decoder counts from the lowest resolution on"


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [
        ({"ch_mult": [1, 1, 1, 1, 1]}, [4], []),
        ({"ch_mult": [1, 1, 1, 1, 1, 1]}, [4], []),
        ({"ch_mult": [1, 1, 1]}, [], []),
        ({"ch_mult": [1, 1, 1], "resolution": 64}, [2], []),
        ({"ch_mult": [1, 1, 1], "attn_resolutions": [128, 64]}, [1, 2], [1, 2]),
    ],
)
def test_attention_of_mar_s_is_where_the_official_resolution_says(config, encoder, decoder) -> None:
    config = {**TINY_KL, **config}
    assert attended(KlEncoder(**config)) == encoder
    assert attended(KlDecoder(**config)) == decoder


def test_mage_s_shortcut_is_of_the_block_s_output() -> None:
    block = ResnetBlock(32, 64, bias=False, of_output=True)
    x = torch.randn(1, 32, 3, 3)
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), block.nin_shortcut(h) + h)


def test_mage_s_encoder_pools_unless_it_is_told_to_convolve() -> None:
    names = {name for name in VqganEncoder(**TINY_VQGAN).state_dict() if "downsample" in name}
    assert not names
    convolving = VqganEncoder(**TINY_VQGAN, resamp_with_conv=True).state_dict()
    assert "encoder.down.0.downsample.conv.weight" in convolving
    assert not [name for name in VqganDecoder(**TINY_VQGAN, resamp_with_conv=False).state_dict() if "upsample" in name]


def test_mage_s_settings_are_the_same_in_a_group() -> None:
    inner = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 16}
    grouped = VqganEncoder(n_embed=40, embed_dim=16, ddconfig=inner).state_dict()
    assert {n: t.shape for n, t in grouped.items()} == {
        n: t.shape for n, t in VqganEncoder(**TINY_VQGAN).state_dict().items()
    }


def test_without_a_variance_of_its_own_the_posterior_s_log_variance_is_one() -> None:
    mean, std = KlEncoder(**TINY_KL, use_variational=False)(torch.rand(1, 3, 4, 4))
    assert mean.shape == std.shape
    torch.testing.assert_close(std, torch.full_like(std, 0.5).exp())


def test_log_variance_is_clamped() -> None:
    module = KlEncoder(**TINY_KL)
    with torch.no_grad():
        module.quant_conv.weight.zero_()
        module.quant_conv.bias.copy_(torch.tensor([99.0, -99] * 5))
        _, std = module(torch.zeros(1, 3, 4, 4))
    torch.testing.assert_close(std.unique(), torch.tensor([-15.0, 10.0]).exp())


def test_of_codes_that_are_equally_near_the_first_is_taken() -> None:
    nearest = Nearest(4, 2)
    nearest.embedding.weight.data = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert nearest(torch.tensor([[[1.0, 0.1], [0.5, 0.0]]])).tolist() == [[1, 1]]


def test_normalised_codes_are_compared_by_their_directions() -> None:
    nearest = Nearest(2, 2, l2_norm=True)
    nearest.embedding.weight.data = torch.tensor([[0.0, 1.0], [1e3, 1.0]])
    assert nearest(torch.tensor([[[0.01, 0.0], [1.0, 2e3]]])).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("half", "setting", "named"),
    [
        *((half, {"ch": 48}, "ch 48") for half in (VqDecoder, VqganEncoder, KlDecoder)),
        *((half, {"ch_mult": []}, "ch_mult") for half in (VqEncoder, VqganDecoder, KlEncoder)),
        *((half, {"ch_mult": 7}, "ch_mult") for half in (VqEncoder, VqganDecoder, KlEncoder)),
        (VqDecoder, {"ch_mult": [1, 0]}, "ch_mult"),
        (KlDecoder, {"ch_mult": "12"}, "ch_mult"),
        (KlEncoder, {"num_res_blocks": 0}, "num_res_blocks"),
        (KlEncoder, {"embed_dim": 0}, "embed_dim"),
        (VqEncoder, {"codebook_size": 0}, "codebook"),
        (VqDecoder, {"codebook_size": 10**12}, "table"),
        (VqganEncoder, {"embed_dim": 8}, "z_channels 256 must be embed_dim 8"),
        (VqganEncoder, {"double_z": True}, "double_z"),
        (VqganDecoder, {"ddconfig": {"width": 3}}, "ddconfig has no width"),
        (VqganDecoder, {"ddconfig": [3]}, "ddconfig"),
        (VqganDecoder, {"grid": [3]}, "grid"),
        (VqganDecoder, {"grid": 3}, "grid"),
    ],
)
def test_impossible_configurations_name_the_argument(half: type, setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        half(**setting)


def test_blocks_of_a_level_change_the_width_once() -> None:
    encoder = VqEncoder(**{**TINY_VQ, "num_res_blocks": 3}).encoder
    assert isinstance(encoder, Encoder)
    shortcuts = [name for name in encoder.state_dict() if name.endswith("nin_shortcut.weight")]
    assert shortcuts == ["conv_blocks.1.res.0.nin_shortcut.weight"]
