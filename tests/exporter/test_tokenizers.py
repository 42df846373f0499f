"""The tokenizers through the exporter: files of both halves, ONNX against the goldens, half precision, INT8, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dexport
from dexport.errors import InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import open_weights
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.decode import CodeDecoder
from tests.exporter.resolving import resolved
from tests.golden import assert_golden, load_golden

TOLERANCE = 5e-5
GOLDENS: dict[str, tuple[str, str, tuple[str, ...], tuple[int, int]]] = {
    "llamagen-vq16-encoder": ("halton-vq-encoder", "image", ("codes",), (24, 20)),
    "llamagen-vq16-decoder": ("halton-vq-decoder", "codes", ("image",), (6, 5)),
    "mage-vqgan-encoder": ("mage-vqgan", "image", ("encoded_ids",), (24, 32)),
    "mage-vqgan-decoder": ("mage-vqgan", "ids", ("decoded_image",), (6, 8)),
    "mar-vae-encoder": ("mar-vae-encoder", "image", ("mean", "std"), (64, 64)),
    "mar-vae-decoder": ("mar-vae-decoder", "z", ("image",), (4, 4)),
}
"""Recipe -> golden, its input and outputs, spatial size."""
TINY = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
TINY_VQ = {**TINY, "z_channels": 16, "codebook_size": 300, "codebook_embed_dim": 6}
TINY_VQGAN = {**TINY, "z_channels": 16, "embed_dim": 16, "n_embed": 300}
SETTINGS: dict[str, dict[str, Any]] = {
    "llamagen-vq16": TINY_VQ,
    "mage-vqgan": TINY_VQGAN,
    "mar-vae": {**TINY, "embed_dim": 5, "attn_resolutions": [128]},
}


def tiny(recipe: str, side: int = 4, **options: Any) -> dict[str, Any]:
    """Options of a small build; ``side`` is that of the codes."""
    pixels = 2 * side if recipe.endswith("encoder") else side
    return {"settings": SETTINGS[recipe.rpartition("-")[0]], "latent": (pixels, pixels), "profile": "ci", **options}


def some_slow(*quick: str) -> list[Any]:
    """Every recipe; those that are not named are tried in the same way."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in GOLDENS]


@pytest.mark.golden
@pytest.mark.parametrize("recipe", some_slow(*(name for name in GOLDENS if name != "mar-vae-encoder")))
def test_onnx_gives_the_official_output(recipe: str, tmp_path: Path) -> None:
    name, given, wanted, latent = GOLDENS[recipe]
    golden = load_golden(name)
    save_file(golden.weights, tmp_path / "tokenizer.safetensors")
    options = {"settings": golden.config, "latent": latent, "checkpoint": str(tmp_path / "tokenizer.safetensors")}
    dexport.build(recipe, tmp_path / "out", **options, parity=False)
    outputs = dexport.load(tmp_path / "out")(**{given: golden.inputs[given].numpy()})
    assert tuple(outputs) == wanted
    for output in wanted:
        expected = golden.outputs[output].numpy()
        assert outputs[output].dtype == expected.dtype
        if expected.dtype == np.int64:
            np.testing.assert_array_equal(outputs[output], expected)
        else:
            assert_golden(outputs[output], expected, TOLERANCE)


@pytest.mark.parametrize("recipe", some_slow("mage-vqgan-encoder", "mage-vqgan-decoder"))
def test_half_precision_passes_its_gate(recipe: str, tmp_path: Path) -> None:
    result = dexport.build(recipe, tmp_path / "out", **tiny(recipe, precision="fp16"))
    assert result.verdict is not None
    assert result.verdict.status == "passed"
    graph = result.bundle.network.manifest["graphs"]["model"]
    half = recipe.rpartition("-")[2]
    high = {name for name, dtype in graph["nodes"].items() if dtype == "float32"}
    assert any(name.endswith("norm1/GroupNormalization") for name in high)
    assert f"{half}.conv_out/Conv" not in high
    assert (f"{half}.conv_in/Conv" in high) == (half == "decoder")
    if recipe == "mar-vae-encoder":
        assert f"{half}.down.1.attn.0/Attention" in high
    (note,) = [
        note for note in result.verdict.notes if note.startswith(("codes, rounded", "encoded_ids, rounded"))
    ] or [""]
    assert ("of 48 choices" in note or "all 48 choices are PyTorch's" in note) == (
        half == "encoder" and not recipe.startswith("mar")
    )


@pytest.mark.parametrize("recipe", some_slow("mage-vqgan-decoder"))
def test_weights_in_int8_pass_their_gate(recipe: str, tmp_path: Path) -> None:
    result = dexport.build(recipe, tmp_path / "out", **tiny(recipe, precision="fp16", int8="weight"))
    assert result.verdict is not None
    assert result.verdict.status == "passed"
    float_size = 4 * sum(
        t.numel() for t in resolve(find_recipe(recipe), SETTINGS[recipe.rpartition("-")[0]]).outline.parameters()
    )
    assert (result.bundle.path / "model.onnx.data").stat().st_size < 0.75 * float_size


# Checkpoints


def whole(kind: str) -> dict[str, torch.Tensor]:
    """A file of both halves, as official ones are."""
    if kind == "mage-vqgan":
        return dict(load_golden("mage-vqgan").weights)
    names = ("halton-vq-encoder", "halton-vq-decoder") if kind == "llamagen-vq16" else ()
    names = names or ("mar-vae-encoder", "mar-vae-decoder")
    return {name: tensor for golden in names for name, tensor in load_golden(golden).weights.items()}


def golden_variant(recipe: str) -> Variant:
    name, _, _, latent = GOLDENS[recipe]
    return resolve(find_recipe(recipe), load_golden(name).config, latent)


def open_half(recipe: str, path: Path) -> WeightSource:
    variant = golden_variant(recipe)
    return open_weights(path, variant.meta_module(), adapt=variant.recipe.adapt)


@pytest.mark.parametrize("recipe", GOLDENS)
def test_each_half_takes_its_own_from_a_file_of_both(recipe: str, tmp_path: Path) -> None:
    state = {**whole(recipe.rpartition("-")[0]), "loss.logvar": torch.zeros(())}
    torch.save({"model": state, "optimizer": {"step": 3}}, tmp_path / "tokenizer.pt")
    source = open_half(recipe, tmp_path / "tokenizer.pt")
    golden = load_golden(GOLDENS[recipe][0])
    assert set(source.shapes) == set(golden_variant(recipe).outline.state_dict())
    assert all(torch.equal(source.read(key, torch.float32), golden.weights[key]) for key in source.shapes)


@pytest.mark.parametrize("recipe", ["mage-vqgan-encoder", "mage-vqgan-decoder"])
def test_mage_s_own_checkpoint_holds_the_tokenizer(recipe: str, tmp_path: Path) -> None:
    state = {f"vqgan.{name}": tensor for name, tensor in whole("mage-vqgan").items()}
    others = {"cls_token": torch.ones(1, 1, 8), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}
    torch.save({"model": {**others, **state}}, tmp_path / "mage.pth")
    source = open_half(recipe, tmp_path / "mage.pth")
    name = next(iter(source.shapes))
    assert torch.equal(source.read(name, torch.float32), state[f"vqgan.{name}"])


@pytest.mark.parametrize(
    ("recipe", "unexpected"),
    [
        ("llamagen-vq16-encoder", "encoder.conv_blocks.0.attn.0.q.weight"),
        ("llamagen-vq16-decoder", "quantize.codebook_unused"),
        ("mage-vqgan-decoder", "decoder.mid.attn_1.q.weight"),
        ("mar-vae-decoder", "decoder.up.4.attn.0.q.weight"),
        ("mar-vae-encoder", "quant.weight"),
    ],
)
def test_what_no_half_has_is_named(recipe: str, unexpected: str, tmp_path: Path) -> None:
    state = {**whole(recipe.rpartition("-")[0]), unexpected: torch.ones(3)}
    save_file(state, tmp_path / "tokenizer.safetensors")
    with pytest.raises(InputError) as caught:
        open_half(recipe, tmp_path / "tokenizer.safetensors")
    assert str(caught.value).splitlines()[1:] == ["  unexpected (1):", f"    {unexpected}"]


def test_a_file_of_the_other_half_is_refused(tmp_path: Path) -> None:
    save_file(load_golden("mar-vae-encoder").weights, tmp_path / "encoder.safetensors")
    with pytest.raises(InputError, match=r"missing \(\d+\):\n    decoder\.conv_in\.weight"):
        open_half("mar-vae-decoder", tmp_path / "encoder.safetensors")


# Sizes


@pytest.mark.parametrize(
    ("recipe", "options", "shape"),
    [
        ("llamagen-vq16-decoder", {"image_size": 384}, ("B", 24, 24)),
        ("llamagen-vq16-decoder", {"latent": (6, 5)}, ("B", 6, 5)),
        ("llamagen-vq16-encoder", {"image_size": 384}, ("B", 3, 384, 384)),
        ("mage-vqgan-decoder", {}, ("B", 256)),
        ("mage-vqgan-decoder", {"latent": (6, 8)}, ("B", 48)),
        ("mage-vqgan-decoder", {"settings": {"grid": [6, 8]}}, ("B", 48)),
        ("mage-vqgan-decoder", {"settings": {"grid": [6, 8]}, "latent": (6, 8)}, ("B", 48)),
        ("mage-vqgan-decoder", {"image_size": 512}, ("B", 1024)),
        ("mar-vae-decoder", {"settings": {"embed_dim": 4, "ch_mult": [1, 2]}, "image_size": 64}, ("B", 4, 32, 32)),
    ],
)
def test_sizes_are_those_of_the_input(recipe: str, options: dict[str, Any], shape: tuple[int | str, ...]) -> None:
    assert resolved(recipe, **options).signature.inputs[0].shape == shape


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("llamagen-vq16-encoder", {"image_size": 100}, "multiple"),
        ("mar-vae-decoder", {"image_size": 100}, "multiple"),
        ("mage-vqgan-decoder", {"settings": {"grid": [6, 8]}, "latent": (8, 8)}, "contradicts"),
        ("mage-vqgan-decoder", {"settings": {"grid": 6}}, "height, width"),
        ("mage-vqgan-decoder", {"settings": {"grid": [6, "a"]}}, "positive multiples"),
        ("mage-vqgan-decoder", {"settings": {"ddconfig": 3}}, "ddconfig"),
        ("mage-vqgan-encoder", {"settings": {"ddconfig": {"ch_mult": 3}}}, "ch_mult"),
        ("llamagen-vq16-encoder", {"settings": {"ch_mult": None}}, "ch_mult"),
        ("mar-vae-encoder", {"settings": {"ch_mult": "wide"}}, "ch_mult"),
        ("mar-vae-encoder", {"settings": {"attn_resolutions": 16}}, "attn_resolutions"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolved(recipe, **options)


# What programs do with them


@pytest.mark.slow
def test_codes_of_an_image_become_pictures_again(tmp_path: Path) -> None:
    """Flat codes, as programs have them, and another range of values than [-1, 1]."""
    for half in ("encoder", "decoder"):
        dexport.build(f"mage-vqgan-{half}", tmp_path / half, **tiny(f"mage-vqgan-{half}", parity=False))
    image = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)
    ids = dexport.load(tmp_path / "encoder")(image=image)["encoded_ids"]
    session = dexport.load(tmp_path / "decoder")

    class Decoder:
        inputs = {"z": session.inputs["ids"]}  # noqa: RUF012

        def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            return {"image": session(ids=inputs["z"])["decoded_image"]}

    pictures = CodeDecoder(Decoder(), black=0.0)(ids.reshape(3, 4, 4))
    np.testing.assert_allclose(pictures, np.clip(2 * session(ids=ids)["decoded_image"] - 1, -1, 1), atol=1e-6)
