"""ViTok v1 and v2 against the official keys, whole and in halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.graphs.vitok_v1 import ViTokV1
from dexport.graphs.vitok_v2 import ViTokV2, raster
from tests.golden import assert_golden, load_keys

SMALL_V1 = {"img_size": 16, "patch_size": 4, "width": 16, "encoder_depth": 2, "decoder_depth": 1, "num_heads": 2}
SMALL_V2 = {
    "pixels_per_token": 48,
    "spatial_stride": 4,
    "channels_per_token": 4,
    "encoder_width": 16,
    "decoder_width": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "encoder_heads": 2,
    "decoder_heads": 2,
}


def noisy(module: torch.nn.Module) -> Any:
    """Weights that are all different, tables included."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.02, 0.3)
    return module.eval()


@pytest.mark.parametrize(
    ("recipe", "keys"), [("vitok-v1-s-b-1x16", "ViTok-v1-S-B-1x16"), ("vitok-v2-350m-f16x64", "ViTok-v2-350M-f16x64")]
)
def test_both_halves_together_have_exactly_the_official_keys(recipe: str, keys: str) -> None:
    halves = [resolve(find_recipe(f"{recipe}-{half}")).meta_module().state_dict() for half in ("encoder", "decoder")]
    assert not halves[0].keys() & halves[1].keys()
    assert {key: list(tensor.shape) for half in halves for key, tensor in half.items()} == load_keys(keys)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"posemb": "dec", "rope_theta": None, "variational": False},
        {"rope_style": "2d_axial", "simple": True},
        {"rope_style": "2d_mixed", "simple": True},
        {"posemb": "learned", "code_length": 5},
        {"posemb": "sincos3d", "num_frames": 4, "tubelet_size": 2, "simple": True},
        {"posemb": "sincos3d", "num_frames": 4, "tubelet_size": 2, "code_length": 5, "lengths": [2, 5]},
    ],
)
@torch.no_grad()
def test_v1_in_halves_is_v1_as_a_whole(settings: dict[str, Any]) -> None:
    config = {**SMALL_V1, "posemb": "sincos2d", **settings}
    whole, encoder, decoder = (
        noisy(ViTokV1(**config, **half)) for half in ({}, {"decoder": False}, {"encoder": False})
    )
    encoder.load_state_dict({name: whole.state_dict()[name] for name in encoder.state_dict()})
    decoder.load_state_dict({name: whole.state_dict()[name] for name in decoder.state_dict()})
    frames = config.get("num_frames", 1)
    picture = torch.randn(2, 3, 16, 16) if frames == 1 else torch.randn(2, 3, frames, 16, 16)
    cut = [torch.tensor([1, 4])] if "lengths" in config else []
    code = encoder(picture)
    code = code[0] if isinstance(code, tuple) else code
    recon = decoder(code, *cut)
    assert recon.shape == picture.shape
    assert recon.std() > 1e-2
    assert_golden(recon, whole(picture, *cut))


@torch.no_grad()
def test_v1_codes_beyond_the_count_do_not_matter() -> None:
    config = {**SMALL_V1, "simple": True, "posemb": "learned", "lengths": [2, 16], "encoder": False}
    decoder = noisy(ViTokV1(**config))
    codes = torch.randn(2, 16, 16)
    changed = codes.clone()
    changed[0, 3:], changed[1, 7:] = 5.0, -5.0
    kept = torch.tensor([3, 7])
    assert_golden(decoder(changed, kept), decoder(codes, kept))
    assert not torch.allclose(decoder(changed, torch.tensor([4, 8])), decoder(codes, torch.tensor([4, 8])))


@torch.no_grad()
def test_v1_without_added_positions_takes_other_sizes() -> None:
    model = noisy(ViTokV1(**SMALL_V1, simple=True))
    assert model(torch.randn(1, 3, 8, 24)).shape == (1, 3, 8, 24)


@torch.no_grad()
def test_v2_padding_is_seen_by_flash_only() -> None:
    patches, (rows, columns) = torch.randn(1, 6, 48), raster(2, 3)
    changed = patches.clone()
    changed[:, 4:] += 1
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    for backend in ("sdpa", "flash"):
        model = noisy(ViTokV2(**SMALL_V2, attn_backend=backend, naflex=True))
        outputs = [model(tokens, rows, columns, mask)[:, :4] for tokens in (patches, changed)]
        assert torch.allclose(*outputs, atol=1e-5) == (backend == "sdpa")


@torch.no_grad()
def test_v2_sliding_window_is_for_flash() -> None:
    image = torch.randn(1, 3, 8, 16)
    far = image.clone()
    far[:, :, 4:, 12:] += 1  # the last token; one block of each half reaches two tokens
    for backend in ("sdpa", "flash"):
        model = noisy(ViTokV2(**SMALL_V2, attn_backend=backend, sw=1))
        first = [model(x)[:, :, :4, :4] for x in (image, far)]
        assert torch.allclose(*first, atol=1e-5) == (backend == "flash")


@torch.no_grad()
def test_v2_images_are_tokens_in_raster_order() -> None:
    images, tokens = (noisy(ViTokV2(**SMALL_V2, naflex=naflex, decoder=False)) for naflex in (False, True))
    image = torch.randn(1, 3, 8, 12)
    patches = torch.nn.functional.unfold(image, 4, stride=4).transpose(1, 2)
    assert_golden(images(image).flatten(2).transpose(1, 2), tokens(patches, *raster(2, 3)))


@pytest.mark.parametrize(
    ("module_class", "changes", "named"),
    [
        (ViTokV1, {"posemb": "rotary"}, "posemb"),
        (ViTokV1, {"rope_style": "3d_axial"}, "rope_style"),
        (ViTokV1, {"num_heads": 3}, "num_heads"),
        (ViTokV1, {"simple": False}, "posemb"),
        (ViTokV1, {"simple": False, "posemb": "learned", "rope_style": "2d_axial"}, "simple"),
        (ViTokV1, {"img_size": 2}, "img_size"),
        (ViTokV1, {"width": 6, "num_heads": 2}, "turn pairs"),
        (ViTokV1, {"encoder": False, "decoder": False}, "both off"),
        (ViTokV2, {"encoder": False, "decoder": False}, "both off"),
        (ViTokV2, {"attn_backend": "xformers"}, "attn_backend"),
        (ViTokV2, {"encoder_heads": 3}, "encoder_width"),
        (ViTokV2, {"decoder_heads": 8}, "decoder_width"),
        (ViTokV2, {"pixels_per_token": 50}, "pixels_per_token"),
    ],
)
def test_impossible_configurations_name_the_argument(module_class: Any, changes: dict[str, Any], named: str) -> None:
    small = {**SMALL_V1, "simple": True} if module_class is ViTokV1 else SMALL_V2
    with pytest.raises(ValueError, match=named):
        module_class(**{**small, **changes})
