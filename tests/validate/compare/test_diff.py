"""``dexport diff``: planted faults are found where they were planted, and nothing where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

import dexport
from dexport import profiles
from dexport.bundle import MODEL, MODEL_DATA, load_bundle
from dexport.cli import main
from dexport.errors import GateError, InputError, UsageError
from dexport.exporter import passes
from dexport.exporter.passes.fold_constants import FoldConstants
from dexport.exporter.recipes import all_recipes, find_recipe
from dexport.exporter.recipes.recipe import DEFAULT_GATES, Islands
from dexport.exporter.variant import resolve
from dexport.validate.compare import graph_pair as comparison
from dexport.validate.compare.block_errors import block_paths
from dexport.validate.compare.diff import ALTERED, EXPORT, INEXACT, PRECISION, Diff, diff
from dexport.validate.compare.fix import fixing_islands
from dexport.validate.gates import FAIL, PASS, Limits
from dexport.validate.levels.forward import check_parity
from dexport.validate.references.recipe_network import variant_of, weights_of
from dexport.validate.validate import validate
from tests.validate.planted import Edit, attribute, loud_checkpoint, one_element, plant, swapped_outputs, weight

TRANSFORMER = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "input_size": 8}
TINY: dict[str, dict[str, Any]] = {
    "dit-s-2": {"settings": TRANSFORMER},
    "dico-s": {"settings": {"hidden_size": 16, "depth": [1, 1, 2, 1, 1], "num_classes": 5}, "latent": (8, 8)},
    "lit-s-2": {"settings": {**TRANSFORMER, "depth": 1}},
    "diffit-256": {"settings": {**TRANSFORMER, "depth": 1}},
    "diffit-image-32": {
        "settings": {"channels": 32, "channel_mult": [1, 2], "num_blocks": [1, 1], "num_heads": 2, "window": 4},
        "latent": (8, 8),
    },
    "terdit-600m": {"settings": {"dim": 32, "n_layers": 1, "n_heads": 2, "num_classes": 5, "input_size": 8}},
    "sd-vae-decoder": {"settings": {"block_out_channels": [32, 32], "layers_per_block": 1}, "latent": (4, 4)},
    "sd-vae-encoder": {"settings": {"block_out_channels": [32, 32], "layers_per_block": 1}, "latent": (8, 8)},
    "llamagen-vq16-encoder": {"settings": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}, "latent": (8, 8)},
    "mage-vqgan-decoder": {"settings": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}, "latent": (4, 4)},
}
Built = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Tiny bundles with seeded weights, each built once."""
    folder = tmp_path_factory.mktemp("built")

    def get(recipe: str, precision: str) -> Path:
        path = folder / f"{recipe}-{precision}"
        if not path.exists():
            dexport.build(recipe, path, precision=precision, profile="ci", parity=False, **TINY[recipe])
        return path

    return get


@pytest.fixture
def exported(built: Built, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The reference is the file of the clean float32 bundle, which is what an export would write again."""

    def use(recipe: str) -> None:
        clean = built(recipe, "fp32")

        def export(_variant: object, _weights: object, folder: Path, **_options: object) -> None:
            for name in (MODEL, MODEL_DATA):
                shutil.copy(clean / name, folder / name)

        monkeypatch.setattr(comparison, "export_onnx", export)

    return use


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)], catch_exceptions=False)


def times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: (array * factor).astype(array.dtype)


# recipe, fault, block, node, what is said about it; whether one evaluation of the whole network shows it in float32
FAULTS: dict[str, tuple[str, Edit, str, str, str, bool]] = {
    "DiT: a weight off by 1 %": (
        *("dit-s-2", weight("blocks.1.mlp.fc1.weight.T", times(1.01))),
        *("blocks.1", "blocks.1.mlp.fc1/MatMul", "times 1.01", True),
    ),
    "DiT: one element off by 1 %": (
        *("dit-s-2", weight("blocks.1.mlp.fc1.weight.T", one_element)),
        *("blocks.1", "blocks.1.mlp.fc1/MatMul", "in 1 of 2304 values", True),
    ),
    "DiT: erf for tanh": (
        *("dit-s-2", attribute("blocks.0.mlp.act/Gelu", "approximate", "none")),
        *("blocks.0", "blocks.0.mlp.act/Gelu", "approximate is 'none', expected 'tanh'", True),
    ),
    "DiT: eps 1e-5": (
        *("dit-s-2", attribute("blocks.1.norm2/LayerNormalization", "epsilon", 1e-5)),
        *("blocks.1", "blocks.1.norm2/LayerNormalization", "epsilon is 1e-05, expected 1e-06", False),
    ),
    "DiT: swapped modulation": (
        *("dit-s-2", swapped_outputs("blocks.0/Split", 0, 1)),
        *("blocks.0", "blocks.0/Split", "output blocks.0/Split.1", True),
    ),
    "DiCo: a weight off by 1 %": (
        *("dico-s", weight("latent.0.conv1.weight", times(1.01))),
        *("latent.0", "latent.0.conv1/Conv", "times 1.01", True),
    ),
    "DiCo: tanh for erf": (
        *("dico-s", attribute("latent.1/Gelu", "approximate", "tanh")),
        *("latent.1", "latent.1/Gelu", "approximate is 'tanh', expected 'none'", True),
    ),
    "DiCo: eps 1e-5": (
        *("dico-s", attribute("encoder_level_2.0.norm1/LayerNormalization", "epsilon", 1e-5)),
        *("encoder_level_2.0", "encoder_level_2.0.norm1/LayerNormalization", "epsilon is 1e-05", False),
    ),
    "DiCo: swapped modulation": (
        *("dico-s", swapped_outputs("decoder_level_2.0/Split", 3, 4)),
        *("decoder_level_2.0", "decoder_level_2.0/Split", "output decoder_level_2.0/Split.4", True),
    ),
    "DiCo: a transposed convolution": (
        *("dico-s", weight("final_layer.out_proj.weight", lambda array: array.transpose(0, 1, 3, 2))),
        *("final_layer", "final_layer.out_proj/Conv", "is transposed: its axes are [0, 1, 3, 2]", True),
    ),
    "VAE: a transposed convolution": (
        *("sd-vae-decoder", weight("decoder.mid_block.resnets.1.conv1.weight", lambda array: array.swapaxes(0, 1))),
        *("decoder.mid_block.resnets.1", "decoder.mid_block.resnets.1.conv1/Conv", "its axes are [1, 0, 2, 3]", True),
    ),
}


IN_HALF = ("DiT: one element off by 1 %", "DiT: eps 1e-5")


@pytest.mark.parametrize(
    ("name", "precision"), [(name, "fp32") for name in FAULTS] + [(name, "fp16") for name in IN_HALF]
)
def test_planted_faults(built: Built, exported: Callable, tmp_path: Path, name: str, precision: str) -> None:
    recipe, edit, block, node, text, _ = FAULTS[name]
    exported(recipe)
    bundle = plant(built(recipe, precision), tmp_path / "planted", edit)
    result = diff(bundle)
    finding = result.finding
    assert finding is not None
    assert (finding.kind, finding.block) == (ALTERED, block)
    assert finding.op is not None and finding.op.node == node
    assert text in finding.differences[0].text
    assert finding.differences[0].node == node
    assert result.others == ()
    assert result.mend is None


@pytest.mark.parametrize("name", ["DiT: one element off by 1 %", "DiT: eps 1e-5", "DiCo: eps 1e-5"])
def test_what_the_whole_network_does_not_show_its_blocks_do(
    built: Built, exported: Callable, tmp_path: Path, name: str
) -> None:
    recipe, edit, block, *_ = FAULTS[name]
    exported(recipe)
    found = validate(plant(built(recipe, "fp32"), tmp_path / "planted", edit), ["op"])
    assert found.verdict == "failed"
    assert [error.path for error in found.blocks[""] if not error.passed] == [block]
    assert {gate.metric for gate in found.gates if gate.verdict == FAIL} >= {"altered_blocks"}


@pytest.mark.parametrize("name", FAULTS)
def test_one_evaluation_of_the_whole_network_shows_most_faults(built: Built, tmp_path: Path, name: str) -> None:
    recipe, edit, *_, visible = FAULTS[name]
    bundle = plant(built(recipe, "fp32"), tmp_path / "planted", edit)
    variant = variant_of(bundle.network)
    weights = weights_of(bundle.network.manifest["weights"], variant)
    report = check_parity(variant, weights, bundle.network.model_path(), precision="fp32", max_batch=2)
    assert report.passed is not visible


def assert_nothing_found(result: Diff) -> None:
    assert result.passed, result.finding
    assert result.outputs <= result.allowed
    assert all(error.unexplained == 0 and error.propagated is not None for error in result.blocks)
    assert len(result.pytorch) >= len(result.blocks) - 3
    assert max(result.pytorch.values()) < DEFAULT_GATES["fp32"]


def some_quick(*quick: str) -> list[Any]:
    """All tiny networks; those that are not named are for `make test-slow`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


@pytest.mark.parametrize("recipe", some_quick("dit-s-2", "sd-vae-encoder"))
def test_nothing_is_found_in_a_clean_half(built: Built, recipe: str) -> None:
    result = diff(load_bundle(built(recipe, "fp16")))
    assert_nothing_found(result)
    assert 1e-4 < max(error.own for error in result.blocks) < result.allowed


@pytest.mark.parametrize("recipe", some_quick("dit-s-2"))
def test_nothing_is_found_in_a_clean_float32(built: Built, recipe: str) -> None:
    result = diff(load_bundle(built(recipe, "fp32")), states="trajectory" if recipe == "dit-s-2" else "example")
    assert_nothing_found(result)
    assert max(error.own for error in result.blocks) < 1e-6


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A half-precision bundle that overflows in one MLP, built with a profile of one's own."""
    folder = tmp_path_factory.mktemp("loud")
    checkpoint = loud_checkpoint(folder / "loud.safetensors", TRANSFORMER)
    ci = (Path(profiles.__file__).parent / "ci.toml").read_text()
    (folder / "mine.toml").write_text(ci.replace('name = "ci"', 'name = "mine"'))
    options = {"settings": TRANSFORMER, "checkpoint": checkpoint, "profile": str(folder / "mine.toml")}
    assert not dexport.build("dit-s-2", folder / "out", precision="fp16", **options).verdict.passed
    return folder / "out"


def test_an_overflow_is_mended_by_islands(loud: Path, tmp_path: Path) -> None:
    result = command(loud, "--fix", "--profile", loud.with_name("mine.toml"), "-o", tmp_path / "fixed", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    finding, mend = document["finding"], document["mend"]
    assert (finding["kind"], finding["block"], finding["op"]["node"]) == (
        *(PRECISION, "blocks.1"),
        "blocks.1.mlp.fc1/MatMul",
    )
    assert finding["op"]["largest"] > 65504 and finding["op"]["not_finite"] > 0
    assert finding["op"]["dtype"] == "float16"
    assert finding["differences"] == []
    assert mend["islands"] == ["blocks.1.mlp.fc1", "blocks.1.mlp.act", "blocks.1.mlp.fc2"]
    assert mend["enough"] and mend["before"]["blocks.1"] is None and mend["after"]["blocks.1"] < 1e-3
    fixed = load_bundle(tmp_path / "fixed")
    assert fixed.manifest["status"] == "passed"
    assert fixed.network.manifest["profile"] == "mine"
    assert set(mend["islands"]) < set(fixed.network.manifest["precision"]["islands"]["modules"])
    assert fixed.network.manifest["config"] == load_bundle(loud).network.manifest["config"]
    gates = {gate.metric: gate for gate in validate(load_bundle(loud), ["op"]).gates}
    assert gates["block_l2"].verdict == FAIL and gates["block_l2"].where == "blocks.1"
    assert gates["altered_blocks"].verdict == PASS


def test_what_a_build_lacks_is_asked_for_before_the_work(loud: Path, tmp_path: Path) -> None:
    result = command(loud, "--fix", "-o", tmp_path / "fixed")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "profile 'mine', which is a file of your own" in result.stderr
    assert "--profile FILE.toml" in result.stderr
    assert not any(tmp_path.iterdir())


def test_graphs_that_share_no_value_are_refused(built: Built, exported: Callable, tmp_path: Path) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        computed = {name for node in graph.node for name in node.output}
        for node in graph.node:
            node.input[:] = [f"other.{name}" if name in computed else name for name in node.input]
            node.output[:] = [f"other.{name}" for name in node.output]
        for value in (*graph.output, *graph.value_info):
            value.name = f"other.{value.name}"

    exported("dit-s-2")
    bundle = plant(built("dit-s-2", "fp32"), tmp_path / "renamed", rename)
    for run in (lambda: diff(bundle), lambda: validate(bundle, ["op"])):
        with pytest.raises(InputError, match=r"renamed shares no value"):
            run()


def test_an_altered_file_is_not_fixed(built: Built, exported: Callable, tmp_path: Path) -> None:
    exported("dit-s-2")
    bundle = plant(built("dit-s-2", "fp16"), tmp_path / "planted", FAULTS["DiT: erf for tanh"][1])
    result = command(bundle.path, "--fix")
    assert result.exit_code == 1
    assert "blocks.0 is altered" in result.stderr
    assert "first bad block: blocks.0" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["planted"]


def test_nothing_to_fix(built: Built, exported: Callable) -> None:
    exported("dit-s-2")
    with pytest.raises(GateError, match="nothing to fix"):
        fixing_islands(diff(load_bundle(built("dit-s-2", "fp16"))))


def test_a_defect_of_the_export_is_seen_by_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reference has the same fault as the file, so that only PyTorch can tell."""
    real = FoldConstants.call

    def broken(self: FoldConstants, model: Any) -> Any:
        result = real(self, model)
        gelu = next(node for node in model.graph if node.op_type == "Gelu")
        gelu.attributes.pop("approximate")
        return result

    monkeypatch.setattr(passes.FoldConstants, "call", broken)
    dexport.build("dit-s-2", tmp_path / "out", profile="ci", parity=False, settings={**TRANSFORMER, "depth": 1})
    finding = diff(load_bundle(tmp_path / "out")).finding
    assert finding is not None
    assert (finding.kind, finding.block, finding.differences) == (EXPORT, "blocks.0.mlp.act", ())


def test_two_bundles(built: Built, tmp_path: Path) -> None:
    fp32, fp16 = built("dit-s-2", "fp32"), built("dit-s-2", "fp16")
    assert command(fp32, fp16).exit_code == 0
    planted = plant(fp16, tmp_path / "planted", FAULTS["DiT: a weight off by 1 %"][1])
    for reference in (fp32, fp16):
        result = command(reference, planted.path, "--json")
        assert result.exit_code == 1
        finding = json.loads(result.stdout)["finding"]
        assert (finding["kind"], finding["block"]) == (ALTERED, "blocks.1")
    result = command(fp16, fp32)
    assert result.exit_code == 2
    assert f"dexport diff {fp32} {fp16}" in result.stderr


def test_bundles_of_different_networks(built: Built, plain: Path) -> None:
    result = command(built("dit-s-2", "fp32"), plain)
    assert result.exit_code == 2
    assert "different networks: recipe is name='dit-fashion' in the first and 'dit-s-2' in the second" in result.stderr


def test_bundles_with_other_passes(built: Built, tmp_path: Path) -> None:
    bundle = built("dit-s-2", "fp32")
    other = shutil.copytree(bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["networks"]["denoiser"]["no_passes"] = ["attention-on-tokens"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    result = command(bundle, other)
    assert result.exit_code == 2
    assert "graph passes without attention-on-tokens and all graph passes" in " ".join(result.stderr.split())


def test_a_quantised_bundle_is_judged_by_own_errors(exported: Callable, tmp_path: Path) -> None:
    exported("dit-s-2")
    options = {"int8": "weight", "profile": "ci", "parity": False}
    dexport.build("dit-s-2", tmp_path / "int8", **options, **TINY["dit-s-2"])
    clean = diff(load_bundle(tmp_path / "int8"))
    assert clean.passed and clean.gate == "int8" and "no reference in the same precision" in clean.notes[0]
    validated = validate(load_bundle(tmp_path / "int8"), ["op"])
    assert [gate.metric for gate in validated.gates] == ["block_l2"]
    assert any("altered blocks: what quantised layers" in reason for reason in validated.not_run)
    with pytest.raises(UsageError, match="altered_blocks has a limit"):
        validate(load_bundle(tmp_path / "int8"), ["op"], limits=Limits({"altered_blocks": 0}))
    planted = plant(load_bundle(tmp_path / "int8").path, tmp_path / "planted", swapped_outputs("blocks.1/Split", 0, 1))
    finding = diff(planted).finding
    assert finding is not None
    assert (finding.kind, finding.block, finding.op and finding.op.node) == (INEXACT, "blocks.1", "blocks.1/Split")
    assert validate(planted, ["op"]).verdict == "failed"


def test_refusals(stitched: Path, built: Built, tmp_path: Path) -> None:
    for more in ((), ("--fix",)):
        assert "holds 2 networks of the role denoiser" in command(stitched, *more).stderr
    assert "-o needs --fix" in command(built("dit-s-2", "fp32"), "-o", tmp_path / "x").stderr
    assert "--profile needs --fix" in command(built("dit-s-2", "fp32"), "--profile", "ci").stderr
    assert "exists already" in command(built("dit-s-2", "fp32"), "--fix", "-o", tmp_path).stderr
    with pytest.raises(UsageError, match="has no program"):
        diff(load_bundle(built("sd-vae-decoder", "fp32")), states="trajectory")


@pytest.mark.parametrize(
    ("recipe", "some"),
    [
        ("dit-s-2", {"x_embedder", "t_embedder", "y_embedder", "blocks.0", "blocks.1", "final_layer"}),
        ("dico-s", {"encoder_level_1.0", "down1_2", "latent.1", "reduce_chan_level2", "final_layer"}),
        ("diffit-image-32", {"net.tokenizer", "net.encoder.0.0", "net.down.0", "net.head"}),
        ("sd-vae-decoder", {"decoder.conv_in", "decoder.mid_block.attentions.0", "decoder.up_blocks.1"}),
        ("llamagen-vq16-encoder", {"encoder.conv_blocks.0.downsample", "encoder.mid", "quant_conv"}),
    ],
)
def test_blocks_are_found_in_any_module_tree(recipe: str, some: set[str]) -> None:
    options = TINY[recipe]
    network = resolve(find_recipe(recipe), options["settings"], options.get("latent")).meta_module()
    paths = block_paths(network)
    assert some <= set(paths)
    assert not any(a != b and a.startswith(f"{b}.") for a in paths for b in paths)


def test_islands_are_those_of_the_manifest() -> None:
    for recipe in all_recipes().values():
        recorded = json.loads(json.dumps(asdict(recipe.islands)))
        assert comparison.islands_of({"precision": {"islands": recorded}}) == recipe.islands
    assert comparison.islands_of({"precision": {"islands": None}}) == Islands()
