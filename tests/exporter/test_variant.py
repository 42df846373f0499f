"""Settings and sizes: what is applied, and what is refused before work starts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dexport.errors import UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.diffusion import CFG_SCALE, guidance_rule, null_label
from dexport.exporter.variant import Variant, parse_settings, resolve
from dexport.runtime.guidance import RULES
from dexport.runtime.programs.diffusion import GUIDED
from tests.exporter.resolving import resolved

TINY_DIT = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 4, "input_size": 8}
TINY_DICO = {"hidden_size": 8, "depth": [1, 1, 1, 1, 1], "num_classes": 4}


def dit(latent: tuple[int, int] | None = None, *graphs: str, **more: Any) -> Variant:
    return resolve(find_recipe("dit-s-2"), {**TINY_DIT, **more}, latent, graphs)


def dico(latent: tuple[int, int] | None = None, *graphs: str, **more: Any) -> Variant:
    return resolve(find_recipe("dico-s"), {**TINY_DICO, **more}, latent, graphs)


# --set


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=20", 20),
        ("a=2.5", 2.5),
        ("a=1e-4", 1e-4),
        ("a=[1,2,2,1,2]", [1, 2, 2, 1, 2]),
        ("a=true", True),
        ("a=True", True),
        ("a=False", False),
        ("a=None", None),
        ("a=null", None),
        ('a="20"', "20"),
        ("a=text", "text"),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ("a=[1,2", "[1,2"),
        ("a=" + "9" * 5000, "9" * 5000),
    ],
)
def test_settings_are_json_or_else_strings(pair: str, value: Any) -> None:
    parsed = parse_settings((pair,))["a"]
    assert parsed == value
    assert type(parsed) is type(value)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_every_json_value_comes_back(value: Any) -> None:
    assert parse_settings((f"name={json.dumps(value)}",)) == {"name": value}


def test_last_of_repeated_settings_wins() -> None:
    assert parse_settings(("a=1", "b=2", "a=3")) == {"a": 3, "b": 2}
    assert parse_settings(()) == {}


@pytest.mark.parametrize("pair", ["hidden_size", "=3", ""])
def test_setting_without_name_or_value(pair: str) -> None:
    with pytest.raises(UsageError, match="is not NAME=VALUE") as caught:
        parse_settings((pair,))
    assert "--set hidden_size=384" in caught.value.hint


def test_settings_reach_the_constructor() -> None:
    module = dico(num_classes=7, learn_sigma=False).meta_module()
    state = module.state_dict()
    assert state["y_embedder.embedding_table_0.weight"].shape == (8, 8)
    assert state["final_layer.out_proj.weight"].shape[0] == 4
    assert not module.training
    assert {tensor.device.type for tensor in state.values()} == {"meta"}


def test_unknown_setting_names_near_misses() -> None:
    with pytest.raises(UsageError, match="dit-s-2 has no setting 'hiden_size'") as caught:
        dit(hiden_size=3)
    assert caught.value.hint.startswith("did you mean hidden_size")
    with pytest.raises(UsageError, match="no setting 'zzz'") as caught:
        dit(zzz=3)
    assert caught.value.hint.startswith("it has input_size, patch_size, ")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("depth", [1], "int, as in depth=28"),
        ("depth", None, "int, as in depth=28"),
        ("depth", "one", "int, as in depth=28"),
        ("depth", True, "int, as in depth=28"),
        ("mlp_ratio", "4", r"float, as in mlp_ratio=4\.0"),
        ("learn_sigma", 1, "bool, as in learn_sigma=True"),
        ("learn_sigma", "no", "bool, as in learn_sigma=True"),
    ],
)
def test_setting_of_the_wrong_type(name: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=rf"--set {name}=.*: expected {expected}") as caught:
        dit(**{name: value})
    assert "dexport info dit-s-2" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 18),
        ("hidden_size", 16.5),
        ("hidden_size", -16),
        ("hidden_size", float("inf")),
        ("hidden_size", 4 * 10**30),
        ("num_heads", 3),
        ("num_heads", 0),
        ("mlp_ratio", -1),
        ("mlp_ratio", float("nan")),
        ("depth", 1.5),
        ("num_classes", 1.5),
        ("in_channels", -1),
        ("patch_size", 0),
    ],
)
def test_configuration_that_the_dit_constructor_refuses(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="dit-s-2: the constructor refuses this configuration: ") as caught:
        dit(**{name: value})
    assert "dexport info dit-s-2" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", [1]),
        ("depth", 3),
        ("depth", None),
        ("depth", "abcde"),
        ("depth", ["a", 1, 1, 1, 1]),
        ("depth", {"a": 1}),
        ("hidden_size", 7),
        ("mlp_ratio", -1),
    ],
)
def test_configuration_that_the_dico_constructor_refuses(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="dico-s: the constructor refuses this configuration: "):
        dico(**{name: value})


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("name", "value"), [("hidden_size", 0), ("in_channels", 0), ("num_classes", -1)])
def test_configuration_with_empty_weights_is_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=r"leaves .* empty") as caught:
        dit(**{name: value})
    assert "--set" in caught.value.hint


def test_recipe_is_not_changed_by_settings() -> None:
    recipe = find_recipe("dit-s-2")
    before = dict(recipe.config)
    resolve(recipe, TINY_DIT)
    assert recipe.config == before


# Spatial size


def test_size_comes_from_the_recipe_the_size_argument_or_the_latent() -> None:
    assert resolve(find_recipe("dit-s-2")).latent == (32, 32)
    assert dit().latent == (8, 8)
    latent = dit((6, 6), input_size=6)
    assert (latent.latent, latent.config["input_size"]) == ((6, 6), 6)
    plain = resolve(find_recipe("dit-s-2"), {"depth": 1}, (16, 16))
    assert (plain.latent, plain.config["input_size"]) == ((16, 16), 16)
    assert plain.meta_module().state_dict()["pos_embed"].shape[1] == 64
    assert dico().latent == (32, 32)


def test_dico_takes_non_square_inputs() -> None:
    variant = dico((8, 20))
    assert variant.latent == (8, 20)
    assert variant.signature.inputs[0].shape == ("B", 4, 8, 20)
    assert variant.signature.outputs[0].shape == ("B", 8, 8, 20)


def test_dit_refuses_non_square_inputs() -> None:
    with pytest.raises(UsageError, match="dit-s-2 takes square inputs only, not 8x16") as caught:
        resolve(find_recipe("dit-s-2"), {}, (8, 16))
    assert caught.value.hint == "for example --latent 8x8"


def test_latent_that_contradicts_the_size_setting() -> None:
    with pytest.raises(UsageError, match="--set input_size=8 contradicts the spatial size 16x16") as caught:
        dit((16, 16))
    assert caught.value.hint == "give one of the two"


@pytest.mark.parametrize("latent", [(6, 8), (8, 6), (0, 8), (-4, 8), (2, 2)])
def test_dico_sizes_are_positive_multiples_of_four(latent: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="must be positive multiples of 4") as caught:
        dico(latent)
    assert caught.value.hint == "for example --latent 32x32"


@pytest.mark.parametrize("size", [7, 0, -2, 8.0])
def test_dit_sizes_are_positive_multiples_of_the_patch(size: Any) -> None:
    with pytest.raises(UsageError, match="must be positive multiples of 2"):
        dit(input_size=size)


@pytest.mark.parametrize(("name", "pixels", "latent"), [("dico-s", 256, 32), ("dico-s", 512, 64), ("dit-s-2", 64, 8)])
def test_image_size_is_in_pixels(name: str, pixels: int, latent: int) -> None:
    assert resolved(name, image_size=pixels).latent == (latent, latent)


@pytest.mark.parametrize("pixels", [0, -8, 4, 100])
def test_image_size_is_a_positive_multiple_of_the_latent_cell(pixels: int) -> None:
    with pytest.raises(UsageError, match=f"--image-size {pixels} is not a positive multiple of 8"):
        resolved("dico-s", image_size=pixels)


def test_image_size_that_gives_an_impossible_latent() -> None:
    with pytest.raises(UsageError, match="spatial input 33x33 must be positive multiples of 4"):
        resolved("dico-s", image_size=264)


def test_image_size_and_latent_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--latent and --image-size exclude each other"):
        resolved("dico-s", image_size=256, latent=(32, 32))


# Other options that are refused before work


@pytest.mark.parametrize("opset", [0, 19, 25])
def test_opset_out_of_range(opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset} is not supported") as caught:
        resolved("dico-s", opset=opset)
    assert caught.value.hint == "20 to 24"


def test_unknown_precision() -> None:
    with pytest.raises(UsageError, match="no precision 'fp8'") as caught:
        resolved("dico-s", precision="fp8")
    assert caught.value.hint == "choose from fp32, fp16, bf16, auto"


@pytest.mark.parametrize("fields", [{"engine": "tensorrt-rtx"}, {"targets": ("sm89",)}])
def test_engine_options_need_trt(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--engine and --target need --trt") as caught:
        resolved("dico-s", **fields)
    assert caught.value.hint == "add --trt"


# Guidance


@pytest.mark.parametrize("make", [dit, dico])
def test_fused_guidance_adds_a_scale(make: Any) -> None:
    plain, fused = make(), make(None, GUIDED)
    assert (plain.graphs, fused.graphs) == (("model",), (GUIDED,))
    assert guidance_rule(fused.recipe, fused.config) == RULES["first three channels"]
    assert [spec.name for spec in fused.signature.inputs] == ["x", "t", "y", CFG_SCALE]
    assert fused.signature.inputs[-1].shape == ()
    assert fused.signature.outputs == plain.signature.outputs
    assert plain.wrap(module := plain.meta_module()) is module


@pytest.mark.parametrize("make", [dit, dico])
def test_guidance_without_null_label_is_refused(make: Any) -> None:
    plain = make(class_dropout_prob=0)
    assert null_label(plain.recipe, plain.config) is None
    with pytest.raises(UsageError, match=r"guidance cannot be fused: class_dropout_prob is 0") as caught:
        make(None, GUIDED, class_dropout_prob=0)
    assert caught.value.hint == "leave out --guidance fused"


def test_guidance_of_a_recipe_without_rule_is_refused() -> None:
    recipe = replace(find_recipe("dico-s"), guidance=None)
    with pytest.raises(UsageError, match="dico-s has no guidance rule to fuse") as caught:
        resolve(recipe, TINY_DICO, graphs=[GUIDED])
    assert caught.value.hint == "leave out --guidance fused"


# Signature


@pytest.mark.parametrize("make", [dit, dico])
def test_signature_describes_the_module(make: Any) -> None:
    variant = make(None, GUIDED)
    inputs = [torch.from_numpy(np.asarray(array)) for array in variant.signature.example(3).values()]
    with torch.inference_mode():
        outputs = variant.wrap(variant.module())(*inputs)
    assert outputs.shape == variant.signature.outputs[0].dims(3)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_example_inputs_are_deterministic_and_in_range(batch: int) -> None:
    signature = dit().signature
    first, again, other = signature.example(batch), signature.example(batch), signature.example(batch, seed=1)
    assert {name: array.shape for name, array in first.items()} == {"x": (batch, 4, 8, 8), "t": (batch,), "y": (batch,)}
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["x"] != other["x"]).any()
    assert ((first["y"] >= 0) & (first["y"] < 4)).all()
    assert ((first["t"] >= 0) & (first["t"] <= 999)).all()
    assert first["t"][0] == 999
    assert batch == 1 or first["t"][-1] == 0


def test_config_is_kept_as_sorted_json() -> None:
    config = json.loads(dit().config_json())
    assert config["hidden_size"] == 16
    assert list(config) == sorted(config)


def test_the_spatial_size_follows_the_patch_size_that_was_set() -> None:
    assert resolve(find_recipe("dit-s-8"), {"patch_size": 2}, (4, 4)).latent == (4, 4)
    with pytest.raises(UsageError, match="multiples of 3"):
        resolve(find_recipe("dit-s-2"), {"patch_size": 3}, (8, 8))
