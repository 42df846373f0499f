"""The registry: every published variant with its exact size and keys, and recipes that users bring."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dexport.errors import UsageError
from dexport.exporter import recipes as registry
from dexport.exporter.describe import count_parameters, describe_recipe
from dexport.exporter.recipes import BUILT_IN, ENTRY_POINT_GROUP, all_recipes, dico, find_recipe
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.variant import resolve
from dexport.exporter.weights.address import SUFFIXES
from dexport.exporter.weights.containers import CONTAINERS
from tests.golden import load_keys

# State dicts of the official classes; positions and null labels included.
PARAMETERS = {
    "dit-s-2": 32_963_360,
    "dit-s-4": 32_945_024,
    "dit-s-8": 33_148_160,
    "dit-b-2": 130_512_416,
    "dit-b-4": 130_475_648,
    "dit-b-8": 130_881_536,
    "dit-l-2": 458_102_816,
    "dit-l-4": 458_053_760,
    "dit-l-8": 458_594_816,
    "dit-xl-2": 675_129_632,
    "dit-xl-4": 675_074_432,
    "dit-xl-8": 675_683_072,
    "dit-xl-2-512": 676_014_368,
    "dico-s": 33_137_672,
    "dico-b": 129_992_712,
    "dico-l": 463_897_992,
    "dico-xl": 701_151_368,
    "dico-h": 1_037_408_328,
    "dico-xl-512": 701_151_368,
    "diffit-256": 561_330_144,
    "diffit-512": 563_562_464,
    "dimr-xl-2r": 505_046_408,
    "dimr-g-2r": 1_056_352_904,
    # From here on no official code exists: the counts of our reading.
    "diffit-image-64": 38_815_731,
    "diffit-image-32": 24_605_139,
    "lit-s-2": 33_023_264,
    "lit-b-2": 130_592_288,
    "lit-l-2": 458_262_560,
    "lit-xl-2": 675_339_296,
    "lit-s-2-512": 33_318_176,
    "lit-b-2-512": 131_182_112,
    "lit-l-2-512": 459_048_992,
    "lit-xl-2-512": 676_224_032,
    "terdit-600m": 609_885_856,
    "terdit-4.2b": 4_238_020_896,
    "terdit-7b": 7_294_082_336,
    "terdit-600m-512": 609_885_856,
    "terdit-4.2b-512": 4_238_020_896,
    "terdit-7b-512": 7_294_082_336,
    "dico-fashion": 2_835_656,
    "dico-fashion-s": 1_218_888,
    "dit-fashion": 2_472_992,
    "dit-fashion-s": 1_068_512,
    "diffit-fashion": 1_554_488,
    "lit-fashion": 1_889_312,
    "terdit-fashion": 2_990_896,
    "mage-vqgan-fashion-encoder": 255_360,
    "mage-vqgan-fashion-decoder": 342_593,
    "maskgit-r-fashion": 1_972_993,
    "mar-fashion": 1_590_944,
    "sd-vae-decoder": 49_490_199,
    "sd-vae-encoder": 34_163_664,
    "halton-maskgit-t": 23_031_425,
    "halton-maskgit-s": 69_344_769,
    "halton-maskgit-b": 142_224_641,
    "halton-maskgit-l": 479_656_961,
    "halton-maskgit-xl": 692_118_401,
    "halton-maskgit-text": 479_761_409,
    "halton-maskgit-t-384": 23_154_305,
    "halton-maskgit-s-384": 69_508_609,
    "halton-maskgit-b-384": 142_470_401,
    "halton-maskgit-l-384": 479_984_641,
    "halton-maskgit-xl-384": 692_487_041,
    # As they generate: without the tokenizer, and without what only training reads.
    "mage-b": 144_896_745,
    "mage-l": 407_788_521,
    "maskgit-r-256": 193_655_297,
    "llamagen-vq16-encoder": 29_431_304,
    "llamagen-vq16-decoder": 42_583_171,
    "mage-vqgan-encoder": 24_037_248,
    "mage-vqgan-decoder": 30_740_483,
    "mar-b": 207_924_768,
    "mar-l": 478_326_304,
    "mar-h": 942_403_104,
    "mar-vae-encoder": 28_266_816,
    "mar-vae-decoder": 38_189_203,
    "vitok-v1-s-b-1x16-encoder": 43_163_960,
    "vitok-v1-s-b-1x16-decoder": 85_698_867,
    "vitok-v1-b-b-1x16-encoder": 85_711_184,
    "vitok-v1-b-b-1x16-decoder": 85_698_867,
    "vitok-v1-s-l-1x16-encoder": 96_617_156,
    "vitok-v1-s-l-1x16-decoder": 383_674_899,
    "vitok-v1-s-h-1x16-encoder": 125_181_940,
    "vitok-v1-s-h-1x16-decoder": 663_050_531,
    "vitok-v1-s-b-4x8-encoder": 43_950_392,
    "vitok-v1-s-b-4x8-decoder": 86_485_299,
    "vitok-v2-350m-f16x16-encoder": 51_209_744,
    "vitok-v2-350m-f16x16-decoder": 303_239_936,
    "vitok-v2-350m-f16x32-encoder": 51_226_144,
    "vitok-v2-350m-f16x32-decoder": 303_256_320,
    "vitok-v2-350m-f16x64-encoder": 51_258_944,
    "vitok-v2-350m-f16x64-decoder": 303_289_088,
    "vitok-v2-5b-f16x16-encoder": 456_011_792,
    "vitok-v2-5b-f16x16-decoder": 4_538_414_848,
    "vitok-v2-5b-f16x32-encoder": 456_060_960,
    "vitok-v2-5b-f16x32-decoder": 4_538_464_000,
    "vitok-v2-5b-f16x64-encoder": 456_159_296,
    "vitok-v2-5b-f16x64-decoder": 4_538_562_304,
    "vitok-v2-5b-f32x64-encoder": 463_237_184,
    "vitok-v2-5b-f32x64-decoder": 4_545_642_496,
    "vitok-v2-5b-f32x128-encoder": 463_433_856,
    "vitok-v2-5b-f32x128-decoder": 4_545_839_104,
    "vitok-v2-5b-f32x256-encoder": 463_827_200,
    "vitok-v2-5b-f32x256-decoder": 4_546_232_320,
}
RECIPE_FILE = """
from dexport.exporter.recipes.dico import variant
from dataclasses import replace
RECIPE = replace(variant("s"), name="mine")
"""
TWO_RECIPES = """
from dexport.exporter.recipes.dico import variant
from dataclasses import replace
RECIPES = [replace(variant("s"), name="small"), replace(variant("b"), name="base")]
"""


# Built in


def test_every_published_variant_is_there() -> None:
    assert set(all_recipes()) == set(PARAMETERS)
    assert len(BUILT_IN) == len(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_official_one(name: str) -> None:
    assert count_parameters(resolve(find_recipe(name))) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("dit-xl-2", "DiT-XL-2-256"),
        ("dico-xl", "DiCo-XL"),
        ("diffit-256", "DiffiT-256"),
        ("dimr-xl-2r", "DiMR-XL-2R"),
        ("halton-maskgit-s", "Halton-MaskGIT-S-256"),
    ],
)
def test_keys_and_shapes_are_exactly_the_official_ones(name: str, keys: str) -> None:
    state = resolve(find_recipe(name)).meta_module().state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == load_keys(keys)


VAES = [recipe for recipe in BUILT_IN if recipe.family == "SD VAE"]
VITOKS = [recipe for recipe in BUILT_IN if recipe.family.startswith("ViTok")]
TOKENIZERS = [recipe for recipe in BUILT_IN if recipe.family in ("LlamaGen VQ", "MAGE VQGAN", "MAR VAE")]
AUTOENCODERS = [*VAES, *VITOKS, *TOKENIZERS]
IMAGE_SPACE = [recipe for recipe in BUILT_IN if recipe.pixels_per_latent == 1 and recipe not in AUTOENCODERS]
DIMR = [recipe for recipe in BUILT_IN if recipe.family == "DiMR"]
LATENT_SPACE = [recipe for recipe in BUILT_IN if recipe.sampling and recipe not in (*IMAGE_SPACE, *AUTOENCODERS, *DIMR)]
SMALL = [recipe for recipe in LATENT_SPACE if "fashion" in recipe.name]


@pytest.mark.parametrize("recipe", IMAGE_SPACE, ids=lambda recipe: recipe.name)
def test_image_space_recipes_say_that_they_are_a_reading(recipe: Recipe) -> None:
    described = json.loads(json.dumps(describe_recipe(recipe)))
    assert [spec["name"] for spec in described["inputs"]] == ["x", "sigma"]
    assert "OWN READING" in described["summary"]
    assert described["checkpoint"]["files"] == []
    assert described["program"]["guidance"] is None


@pytest.mark.parametrize("recipe", LATENT_SPACE, ids=lambda recipe: recipe.name)
def test_description_of_a_recipe_is_complete_json(recipe: Recipe) -> None:
    described = json.loads(json.dumps(describe_recipe(recipe)))
    assert [spec["name"] for spec in described["inputs"]] == ["x", "t", "y"]
    assert [spec["name"] for spec in described["outputs"]] == ["out"]
    size = 16 if recipe in SMALL else 64 if recipe.name.endswith("512") else 32
    assert described["inputs"][0]["shape"] == ["B", 4, size, size]
    assert described["outputs"][0]["shape"] == ["B", 8, size, size]
    assert described["checkpoint"]["formats"] == list(SUFFIXES)
    assert described["checkpoint"]["containers"][1:] == list(CONTAINERS)
    assert set(described["gates_relative_l2"]) == {"fp32", "fp16", "bf16", "int8", "w8a8", "int4", "ternary"}
    assert described["program"]["guidance"]["channels"] == (4 if recipe in SMALL else 3)
    assert described["program"]["decoding"]["scale"] == (1.0 if recipe in SMALL else 0.18215)
    assert described["islands"]["modules"]
    assert described["quantize_exclude"] == list(recipe.quantize_exclude)
    assert described["settings"]["num_classes"] == (10 if recipe in SMALL else 1000)
    assert recipe.config.items() <= described["settings"].items()


@pytest.mark.parametrize("recipe", VITOKS, ids=lambda recipe: recipe.name)
def test_vitok_describes_the_half_that_it_is(recipe: Recipe) -> None:
    described = json.loads(json.dumps(describe_recipe(recipe)))
    ends = [spec["name"] for spec in (*described["inputs"], *described["outputs"])]
    picture = "video" if "4x8" in recipe.name else "image"
    if recipe.name.endswith("decoder"):
        assert ends == ["z", picture]
    else:
        assert ends == ([picture, "z"] if recipe.family == "ViTok v2" else [picture, "mean", "logvar"])
    assert described["program"] is None
    assert bool(described["checkpoint"]["from"]) == (recipe.family == "ViTok v2")


@pytest.mark.parametrize("recipe", DIMR, ids=lambda recipe: recipe.name)
def test_dimr_predicts_noise_without_variance_from_its_own_clock(recipe: Recipe) -> None:
    described = json.loads(json.dumps(describe_recipe(recipe)))
    assert {spec["name"]: spec["shape"] for spec in described["inputs"]} == {
        "x": ["B", 4, 32, 32],
        "log_snr": ["B"],
        "y": ["B"],
    }
    assert {spec["name"]: spec["shape"] for spec in described["outputs"]} == {"out": ["B", 4, 32, 32]}
    program = described["program"]
    assert (program["guidance"], program["cfg_scale"]) == ({"channels": None, "power": None}, 1.4)
    assert (program["sampler"], program["steps"]) == ("dpm-solver", 250)
    assert described["checkpoint"]["from"].startswith("hf://QHL067/DiMR/DiMR-")


@pytest.mark.parametrize(
    ("recipe", "inputs", "outputs"),
    [
        (VAES[0], {"z": ["B", 4, 32, 32]}, {"image": ["B", 3, 256, 256]}),
        (VAES[1], {"image": ["B", 3, 256, 256]}, {"mean": ["B", 4, 32, 32], "logvar": ["B", 4, 32, 32]}),
    ],
)
def test_autoencoders_say_what_they_take_and_give(recipe: Recipe, inputs: dict, outputs: dict) -> None:
    described = json.loads(json.dumps(describe_recipe(recipe)))
    assert {spec["name"]: spec["shape"] for spec in described["inputs"]} == inputs
    assert {spec["name"]: spec["shape"] for spec in described["outputs"]} == outputs
    assert described["program"] is None
    assert described["settings"]["latent_channels"] == 4
    assert described["checkpoint"]["from"].startswith("hf://stabilityai/sd-vae-ft-ema/")


PICTURE = ["B", 3, 256, 256]


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("llamagen-vq16-encoder", {"image": PICTURE}, {"codes": ["B", 16, 16]}),
        ("llamagen-vq16-decoder", {"codes": ["B", 16, 16]}, {"image": PICTURE}),
        ("mage-vqgan-encoder", {"image": PICTURE}, {"encoded_ids": ["B", 256]}),
        ("mage-vqgan-decoder", {"ids": ["B", 256]}, {"decoded_image": PICTURE}),
        ("mar-vae-encoder", {"image": PICTURE}, {"mean": ["B", 16, 16, 16], "std": ["B", 16, 16, 16]}),
        ("mar-vae-decoder", {"z": ["B", 16, 16, 16]}, {"image": PICTURE}),
    ],
)
def test_tokenizers_say_what_they_take_and_give(name: str, inputs: dict, outputs: dict) -> None:
    described = json.loads(json.dumps(describe_recipe(find_recipe(name))))
    assert {spec["name"]: spec["shape"] for spec in described["inputs"]} == inputs
    assert {spec["name"]: spec["shape"] for spec in described["outputs"]} == outputs
    assert {spec["role"] for spec in described["inputs"]} == {"picture" if name.endswith("encoder") else "latent"}
    assert described["program"] is None
    assert described["checkpoint"]["from"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dit-xl-2", "DiT-XL-2-256x256.pt"),
        ("dit-xl-2-512", "DiT-XL-2-512x512.pt"),
        ("dico-xl", "DiCo-XL-3750K-256x256.pt"),
        ("dico-s", "DiCo-S-400K-256x256.pt"),
    ],
)
def test_official_weights_are_named(name: str, file: str) -> None:
    described = describe_recipe(find_recipe(name))["checkpoint"]
    assert file in described["files"]
    assert described["from"].endswith(file)


@pytest.mark.parametrize("name", ["dit-s-2", "dico-h", "dico-xl-512"])
def test_variants_without_official_weights_name_none(name: str) -> None:
    described = describe_recipe(find_recipe(name))["checkpoint"]
    assert (described["files"], described["from"]) == ([], "")


# Names


@pytest.mark.parametrize(
    ("name", "near"),
    [("dico-xxl", "dico-xl"), ("dit-xl2", "dit-xl-2"), ("dico", "dico-s"), ("dt-s-2", "dit-s-2")],
)
def test_unknown_recipe_names_near_misses(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"no recipe named '{name}'") as caught:
        find_recipe(name)
    assert near in caught.value.hint
    assert caught.value.hint.startswith("did you mean ")


@pytest.mark.parametrize("name", ["zzzzzz", ""])
def test_unknown_recipe_without_near_miss_points_to_the_list(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_recipe(name)
    assert caught.value.hint == "`dexport recipes` lists them all"


# Files


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "my recipe.py"
        path.write_text(text)
        return path

    return write


def test_recipe_file(recipe_file: Callable[[str], Path]) -> None:
    path = recipe_file(RECIPE_FILE)
    assert find_recipe(str(path)).name == "mine"
    assert find_recipe(f"{path}:mine").name == "mine"
    assert "mine" not in all_recipes()


def test_recipe_file_with_several(recipe_file: Callable[[str], Path]) -> None:
    path = recipe_file(TWO_RECIPES)
    assert find_recipe(f"{path}:base").config["hidden_size"] == 256
    for address in (str(path), f"{path}:other"):
        with pytest.raises(UsageError, match="has recipes small, base") as caught:
            find_recipe(address)
        assert caught.value.hint == f"name one: {path}:small"


def test_recipe_file_that_is_absent(tmp_path: Path) -> None:
    for address in (tmp_path / "absent.py", f"{tmp_path / 'absent.py'}:name", tmp_path):
        with pytest.raises(UsageError):
            find_recipe(str(address))
    with pytest.raises(UsageError, match=r"recipe file .*absent\.py does not exist"):
        find_recipe(str(tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module_zz", "ModuleNotFoundError: No module named 'no_such_module_zz'"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemError('gone')", "SystemError: gone"),
    ],
)
def test_broken_recipe_file_says_why(recipe_file: Callable[[str], Path], text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"my recipe\.py failed to load: ") as caught:
        find_recipe(str(recipe_file(text)))
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["", "RECIPE = 3", "RECIPES = []", "RECIPES = ['dico-s']", "RECIPE = None"])
def test_file_without_recipe(recipe_file: Callable[[str], Path], text: str) -> None:
    with pytest.raises(UsageError, match="offers no dexport Recipe") as caught:
        find_recipe(str(recipe_file(text)))
    assert "RECIPE = Recipe(...)" in caught.value.hint


# Entry points


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Pretend that a distribution offers this object under the group of recipes."""

    def pretend(offered: Any) -> None:
        class Point(importlib.metadata.EntryPoint):
            def load(self) -> Any:
                return offered

        def entry_points(*, group: str) -> list[Any]:
            return [Point("theirs", "their_package:RECIPES", group)] if group == ENTRY_POINT_GROUP else []

        monkeypatch.setattr(registry, "entry_points", entry_points)

    return pretend


def renamed(name: str) -> Recipe:
    return replace(dico.variant("s"), name=name)


def test_installed_recipes_are_listed_and_found(install: Callable[[Any], None]) -> None:
    install([renamed("their-a"), renamed("their-b")])
    assert set(all_recipes()) == {*PARAMETERS, "their-a", "their-b"}
    assert find_recipe("their-b").name == "their-b"
    with pytest.raises(UsageError) as caught:
        find_recipe("their-c")
    assert "their-a" in caught.value.hint


def test_single_installed_recipe(install: Callable[[Any], None]) -> None:
    install(renamed("their-a"))
    assert find_recipe("their-a").family == "DiCo"


def test_installed_recipe_may_not_shadow_another(install: Callable[[Any], None]) -> None:
    install(renamed("dico-xl"))
    with pytest.raises(UsageError, match="entry point theirs offers recipe 'dico-xl', which exists already"):
        all_recipes()


def test_entry_point_without_recipe(install: Callable[[Any], None]) -> None:
    install("nothing")
    with pytest.raises(UsageError, match="entry point theirs offers no dexport Recipe"):
        all_recipes()


def test_group_of_entry_points_is_the_documented_one() -> None:
    assert ENTRY_POINT_GROUP == "dexport.recipes"
