"""The SD VAE through the exporter: every checkpoint layout, both halves in ONNX, resolution, half precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

import dexport
from dexport.cli import main
from dexport.errors import InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import Variant, resolve
from dexport.exporter.weights.loading import load_into, open_weights
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.decode import VaeDecoder
from tests.exporter.resolving import resolved
from tests.golden import assert_golden, load_golden

GATE_FP16 = 3e-3
HALVES = ["decoder", "encoder"]
State = dict[str, Tensor]


def whole_vae() -> State:
    """Both goldens' weights in one state dict, as official files have them."""
    return {name: tensor for half in HALVES for name, tensor in load_golden(f"sdvae-{half}").weights.items()}


def old_diffusers(state: State) -> State:
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, old in renamed.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    return {rename(name): tensor for name, tensor in state.items()}


def compvis(state: State) -> State:
    """The layout of the original code, by the map that the goldens carry, with what its training leaves in the file."""
    names = {
        name: other
        for half in HALVES
        for name, other in json.loads(load_golden(f"sdvae-{half}").metadata["compvis_key_map"]).items()
    }
    original = {
        names[name]: tensor[..., None, None] if "attentions" in name and tensor.dim() == 2 else tensor
        for name, tensor in state.items()
    }
    return {**original, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 2)}


def stable_diffusion(state: State) -> State:
    first_stage = {f"first_stage_model.{name}": tensor for name, tensor in compvis(state).items()}
    others = ("model.diffusion_model.out.2.weight", "cond_stage_model.transformer.x", "betas", "model_ema.decay")
    return {**{name: torch.ones(2) for name in others}, **first_stage}


LAYOUTS: dict[str, tuple[Callable[[State], State], str, str]] = {
    "diffusers": (lambda state: state, ".safetensors", "diffusers"),
    "old diffusers": (old_diffusers, ".bin", "diffusers"),
    "CompVis": (compvis, ".ckpt", "CompVis"),
    "Stable Diffusion": (stable_diffusion, ".ckpt", "CompVis"),
    "Stable Diffusion, safetensors": (stable_diffusion, ".safetensors", "CompVis"),
}


def save(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 7} if path.suffix == ".ckpt" else state, path)
    return path


def variant(half: str) -> Variant:
    golden = load_golden(f"sdvae-{half}")
    size = next(iter(golden.inputs.values())).shape
    return resolve(find_recipe(f"sd-vae-{half}"), golden.config, (size[2], size[3]))


def open_half(half: str, path: Path) -> WeightSource:
    chosen = variant(half)
    return open_weights(path, chosen.meta_module(), adapt=chosen.recipe.adapt)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout: str, tmp_path: Path) -> None:
    convert, suffix, name = LAYOUTS[layout]
    path = save(convert(whole_vae()), tmp_path / f"vae{suffix}")
    for half in HALVES:
        source = open_half(half, path)
        expected = load_golden(f"sdvae-{half}").weights
        assert set(source.shapes) == set(expected)
        assert all(torch.equal(source.read(key, torch.float32), tensor) for key, tensor in expected.items())
        assert (source.origin.path, source.origin.layout) == (str(path), name)


def test_a_file_of_one_half_is_enough(tmp_path: Path) -> None:
    path = save(load_golden("sdvae-decoder").weights, tmp_path / "decoder.safetensors")
    assert len(open_half("decoder", path).shapes) == len(load_golden("sdvae-decoder").weights)
    with pytest.raises(InputError, match=r"missing \(\d+\):\n    encoder\.conv_in\.weight"):
        open_half("encoder", path)


@pytest.mark.parametrize(
    ("layout", "unexpected"),
    [
        ("diffusers", "decoder.up_blocks.0.attentions.0.to_q.weight"),
        ("diffusers", "post_quant.weight"),
        ("diffusers", "decoder.mid_block.attentions.0.query.weight"),
        ("CompVis", "decoder.up.1.attn.0.norm.weight"),
        ("CompVis", "decoder.up.9.block.0.conv1.weight"),
        ("CompVis", "decoder.up.0.block.0.conv9.weight"),
        ("CompVis", "quantize.embedding.weight"),
        ("Stable Diffusion", "first_stage_model.decoder.mid.attn_2.q.weight"),
    ],
)
def test_an_unknown_key_is_named_as_the_file_names_it(layout: str, unexpected: str, tmp_path: Path) -> None:
    convert, suffix, _ = LAYOUTS[layout]
    path = save({**convert(whole_vae()), unexpected: torch.ones(3)}, tmp_path / f"vae{suffix}")
    with pytest.raises(InputError) as caught:
        open_half("decoder", path)
    assert str(caught.value).splitlines()[1:] == ["  unexpected (1):", f"    {unexpected}"]


def test_missing_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    state = compvis(whole_vae())
    del state["decoder.mid.attn_1.q.weight"]
    state["decoder.conv_in.weight"] = torch.ones(64, 8, 3, 3)
    with pytest.raises(InputError) as caught:
        open_half("decoder", save(state, tmp_path / "vae.ckpt"))
    assert "CompVis layout" in str(caught.value)
    assert "    decoder.mid_block.attentions.0.to_q.weight" in str(caught.value)
    assert "decoder.conv_in.weight: [64, 8, 3, 3] in the checkpoint, [64, 4, 3, 3] in the model" in str(caught.value)


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(load_golden("dit-s").weights, tmp_path / "dit.pt")
    with pytest.raises(InputError, match=r"unexpected \(\d+\):\n    blocks"):
        open_half("decoder", path)


# ONNX


@pytest.mark.golden
@pytest.mark.parametrize("layout", ["diffusers", "CompVis"])
@pytest.mark.parametrize("half", HALVES)
def test_onnx_gives_the_official_output(half: str, layout: str, tmp_path: Path) -> None:
    golden, chosen = load_golden(f"sdvae-{half}"), variant(half)
    convert, suffix, _ = LAYOUTS[layout]
    path = save(convert(whole_vae()), tmp_path / f"vae{suffix}")
    options = {"settings": golden.config, "latent": chosen.latent, "checkpoint": str(path), "parity": False}
    result = dexport.build(chosen.recipe, tmp_path / "out", **options)
    assert result.bundle.network.manifest["weights"]["layout"] == layout
    assert not result.bundle.network.manifest["weights"]["random"]
    outputs = dexport.load(tmp_path / "out")(**{name: tensor.numpy() for name, tensor in golden.inputs.items()})
    assert list(outputs) == (["image"] if half == "decoder" else ["mean", "logvar"])
    for name, array in outputs.items():
        assert_golden(array, golden.outputs[name].numpy())


def test_a_bundle_decodes_latents_of_its_size_and_larger_ones(tmp_path: Path) -> None:
    settings = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    dexport.build("sd-vae-decoder", tmp_path / "out", settings=settings, latent=(4, 6), parity=False)
    session = dexport.load(tmp_path / "out")
    decode = VaeDecoder(session, latent_scale=0.5)
    z = np.random.default_rng(0).standard_normal((2, 4, 4, 6), dtype=np.float32)
    np.testing.assert_array_equal(decode(z / 2), np.clip(session(z=z)["image"], -1, 1))
    assert decode(np.zeros((1, 4, 9, 6), np.float32)).shape == (1, 3, 18, 12)


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_from_the_command_line(half: str, tmp_path: Path) -> None:
    settings = ["block_out_channels=[16,32]", "layers_per_block=1", "norm_num_groups=8", "latent_channels=3"]
    arguments = [f"--set={setting}" for setting in settings] + ["--image-size=16", "--fp16", "--profile=ci", "--json"]
    result = CliRunner().invoke(main, ["build", f"sd-vae-{half}", "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest["status"] == "passed"
    graph = manifest["networks"]["network"]["graphs"]["model"]
    shapes = {spec["name"]: spec["shape"] for spec in (*graph["inputs"], *graph["outputs"])}
    assert shapes["image"] == ["B", 3, 16, 16]
    assert shapes["z" if half == "decoder" else "mean"] == ["B", 3, 8, 8]
    high = {name for name, dtype in graph["nodes"].items() if dtype == "float32"}
    assert any(name.endswith("norm1/GroupNormalization") for name in high)
    assert f"{half}.mid_block.attentions.0/Attention" in high
    assert not any("/Conv" in name for name in high)


@pytest.mark.parametrize("half", HALVES)
def test_activations_of_thousands_do_not_overflow_in_half_precision(half: str, tmp_path: Path) -> None:
    golden, chosen = load_golden(f"sdvae-{half}"), variant(half)
    grown = (".conv2.weight", "conv_in.weight", "to_out.0.weight")
    state = {name: tensor * 2000 if name.endswith(grown) else tensor for name, tensor in golden.weights.items()}
    path = save(state, tmp_path / "grown.safetensors")

    peak = 0.0

    def watch(_module: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        nonlocal peak
        if isinstance(output, Tensor):
            peak = max(peak, output.abs().max().item())

    module = load_into(open_half(half, path), chosen.meta_module())
    for part in module.modules():
        part.register_forward_hook(watch)
    with torch.no_grad():
        module(*golden.inputs.values())
    assert 3_000 < peak < 60_000

    options = {"settings": golden.config, "latent": chosen.latent, "checkpoint": str(path), "profile": "ci"}
    result = dexport.build(chosen.recipe, tmp_path / "out", precision="fp16", **options)
    assert result.verdict is not None
    assert result.verdict.passed
    assert result.verdict.summary()["worst_relative_l2"]["rounded"] < GATE_FP16


# Resolution


@pytest.mark.parametrize(
    ("half", "settings", "image_size", "expected"),
    [
        ("decoder", {}, None, 32),
        ("decoder", {}, 512, 64),
        ("decoder", {"block_out_channels": [32, 64, 64]}, 512, 128),
        ("encoder", {}, None, 256),
        ("encoder", {}, 512, 512),
    ],
)
def test_image_size_is_that_of_the_image(half: str, settings: dict, image_size: int | None, expected: int) -> None:
    assert resolved(f"sd-vae-{half}", settings=settings, image_size=image_size).latent == (expected, expected)


@pytest.mark.parametrize(("half", "image_size"), [("decoder", 100), ("encoder", 100), ("encoder", 12)])
def test_images_that_do_not_divide_into_latents_are_refused(half: str, image_size: int) -> None:
    with pytest.raises(UsageError, match="multiple"):
        resolved(f"sd-vae-{half}", image_size=image_size)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("widths", [7, [], "wide", [0], None, [32, "a"]])
def test_bad_levels_are_refused_by_the_constructor(half: str, widths: object) -> None:
    with pytest.raises(UsageError):
        resolved(f"sd-vae-{half}", settings={"block_out_channels": widths}, image_size=64)
