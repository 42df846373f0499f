"""Precision maps: what they say about each layer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dexport
from dexport.errors import InputError, UsageError
from dexport.exporter import passes
from dexport.exporter.passes.pointwise_conv import PointwiseConvToMatMul
from dexport.exporter.quantize.layers import NetworkLayer, graph_layers, network_layers
from dexport.exporter.quantize.precision_map import read_map, resolve_map
from dexport.exporter.quantize.schemes import SCHEMES, gate_of
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import DEFAULT_GATES
from dexport.exporter.tracing.trace import trace
from dexport.exporter.variant import resolve
from dexport.exporter.weights.source import RandomSource
from dexport.validate.levels.trajectory import DEFAULT_SNR
from tests.bundles import NARROW

LAYERS = {
    "embed": NetworkLayer((8, 4, 2, 2), convolution=True),
    "blocks.0.fc": NetworkLayer((8, 8), convolution=False),
    "blocks.1.fc": NetworkLayer((8, 8), convolution=False),
    "blocks.1.conv": NetworkLayer((8, 8, 3, 3), convolution=True),
    "final": NetworkLayer((4, 8), convolution=False),
}
EXCLUDE = ("embed", "final")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"*": "int8"}, {"blocks.0.fc": "int8", "blocks.1.fc": "int8", "blocks.1.conv": "int8"}),
        ({"blocks.1": "ternary"}, {"blocks.1.fc": "ternary", "blocks.1.conv": "int8"}),
        ({"*": "w8a8", "blocks.?.fc": "int4"}, {"blocks.0.fc": "int4", "blocks.1.fc": "int4", "blocks.1.conv": "w8a8"}),
        ({"blocks.0.fc": "int8", "blocks*": "float"}, {"blocks.0.fc": "int8"}),
        ({"final": "int4", "emb*": "int8"}, {"final": "int4"}),
    ],
)
def test_names_beat_patterns_and_exclusions(asked: dict[str, str], expected: dict[str, str]) -> None:
    assert resolve_map(asked, LAYERS, EXCLUDE) == dict.fromkeys(LAYERS, "float") | expected


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ({"blocks.0.fd": "int8"}, r"no layer is called 'blocks.0.fd'", "did you mean blocks.0.fc"),
        ({"zzz": "int8"}, r"no layer is called 'zzz'", "layers are called like embed"),
        ({"*": "int9"}, r"the unknown scheme 'int9'", "did you mean int"),
        ({"*": "q"}, r"the unknown scheme 'q'", "choose from float, int8, w8a8, int4, ternary"),
        ({"blocks.1.conv": "int4"}, r"blocks.1.conv is a convolution, which cannot be int4", "float, int8 or w8a8"),
        ({"own": "int8"}, r"own is ternary by construction", "--quantize none"),
    ],
)
def test_what_is_wrong_is_named(asked: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve_map(asked, LAYERS, EXCLUDE, ["own"])
    assert hint in caught.value.hint


def test_a_map_comes_from_a_file_a_manifest_or_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"*": "int8"}')
    assert read_map(tmp_path / "map.json") == {"*": "int8"}
    main, decoder = ({"precision": {"layers": {"a": scheme}}} for scheme in ("int4", "int8"))
    manifest = {"schema": 2, "networks": {"denoiser": main, "decoder": decoder}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_map(tmp_path / "manifest.json") == read_map(tmp_path) == {"a": "int4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[1]", "no map from layers to schemes"),
        ('{"a": 1}', "no map from layers to schemes"),
        ('{"schema": 1}', "a manifest without a precision map"),
        ('{"schema": 2, "networks": {}}', "a manifest without a precision map"),
        ('{"schema": 2, "networks": {"denoiser": {"precision": {}}}}', "a manifest without a precision map"),
    ],
)
def test_a_file_that_is_no_map_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_map(tmp_path / "map.json")
    with pytest.raises(UsageError, match=r"does not exist"):
        read_map(tmp_path / "absent.json")


def test_the_least_exact_scheme_gives_the_gate() -> None:
    assert gate_of(["float", "float"], "fp16") == "fp16"
    assert gate_of([], "fp32") == "fp32"
    assert gate_of(["int8", "ternary", "w8a8"], "fp16") == "ternary"
    assert set(SCHEMES) - {"float"} <= DEFAULT_GATES.keys() & DEFAULT_SNR.keys()


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("dit-fashion", NARROW),
        ("lit-fashion", NARROW),
        ("diffit-fashion", NARROW),
        ("dico-fashion", {"hidden_size": 8, "depth": [1, 0, 1, 0, 1]}),
        ("terdit-fashion", {"dim": 32, "n_layers": 1, "n_heads": 2, "multiple_of": 32}),
    ],
)
def test_network_and_graph_have_the_same_layers(recipe: str, settings: dict) -> None:
    variant = resolve(find_recipe(recipe), settings)
    model = passes.clean()(trace(variant, RandomSource(variant.meta_module(), 0))).model
    PointwiseConvToMatMul()(model)
    layers, nodes = network_layers(variant), graph_layers(model)
    assert layers.keys() == nodes.keys()
    for path, layer in layers.items():
        node = nodes[path]
        assert node.weight.shape is not None
        assert node.weight.shape[node.output_axis] == layer.rows
        assert (node.node.op_type == "Conv") == layer.convolution


def test_the_manifest_gives_the_map_back(tmp_path: Path) -> None:
    given = {
        "blocks.*": "int8",
        "blocks.0.attn.qkv": "ternary",
        "blocks.0.mlp.fc1": "int4",
        "final_layer.linear": "int8",
    }
    options = {"settings": NARROW, "profile": "ci", "calibration_images": 4, "parity": False}
    first = dexport.build("dit-fashion", tmp_path / "a", precision_map=given, **options).bundle
    layers = first.network.manifest["precision"]["layers"]
    assert {layers[path] for path in layers if path.startswith("t_embedder")} == {"float"}
    assert layers["final_layer.linear"] == "int8"
    assert layers["blocks.0.adaLN_modulation.1"] == "float"
    assert first.network.manifest["precision"]["gate"] == "ternary"
    again = dexport.build("dit-fashion", tmp_path / "b", precision_map=tmp_path / "a/manifest.json", **options).bundle
    assert again.network.manifest["precision"] == first.network.manifest["precision"]
    assert {name: entry for name, entry in again.manifest["files"].items() if name.startswith("model")} == {
        name: entry for name, entry in first.manifest["files"].items() if name.startswith("model")
    }
    report = json.loads((tmp_path / "a/reports/rounding.json").read_text())
    assert set(report["layers"]) == {"blocks.0.attn.qkv", "blocks.0.mlp.fc1"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": "weight", "precision_map": {"*": "int4"}}, r"--quantize int8 and map exclude each other"),
        ({"int8": "weight", "ternary": True}, r"--quantize ternary excludes"),
        ({"ternary": True, "opset": 22}, r"need opset 23"),
        ({"ternary_carrier": "int8"}, r"no ternary layers to carry"),
        ({"precision_map": {"blocks.9": "int8"}}, r"no layer is called 'blocks.9'"),
        ({"ternary": True, "calibration_images": 3}, r"3 calibration images are too few"),
    ],
)
def test_contradictions_are_refused_before_work_starts(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        dexport.build("dit-fashion", tmp_path / "out", settings=NARROW, **options)
    assert not any(tmp_path.iterdir())


def test_what_is_not_sampled_cannot_be_rounded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no trajectory to calibrate on, which W8A8, INT4 and ternary need"):
        dexport.build("sd-vae-decoder", tmp_path / "out", ternary=True)


def test_a_map_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_bytes(b'\xef\xbb\xbf{"*": "int8"}')
    assert read_map(tmp_path / "map.json") == {"*": "int8"}
