"""Stitched bundles: what may be joined, and what is refused before any work."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import dexport
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.cli.commands.build_printer import print_result
from dexport.cli.terminal import out
from dexport.errors import InputError, UsageError
from dexport.exporter.options import Player
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.fashion import CLASSES
from dexport.runtime.opened import OpenProgram
from dexport.validate.build import parse_stitch

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2}


def test_shares_with_checkpoints() -> None:
    assert parse_stitch("dit-s-2=hf://a/b@c/small.pt:0.4,dit-xl-2:0.6") == (
        Player("dit-s-2", "hf://a/b@c/small.pt", 0.4),
        Player("dit-xl-2", None, 0.6),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dit-s-2:1", "is one denoiser"),
        ("dit-s-2,dit-xl-2", "has no fraction"),
        ("dit-s-2:a,dit-xl-2:b", "has no fraction"),
        (":0.4,dit-xl-2:0.6", "names no denoiser"),
        ("dit-s-2:0.4,dit-xl-2:0.4", "do not share out"),
        ("dit-s-2:-0.5,dit-xl-2:1.5", "do not share out"),
        ("", "has no fraction"),
    ],
)
def test_other_forms_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_stitch(text)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ("dit-s-3", "no recipe named 'dit-s-3'"),
        ("dit-fashion", "condition: .*classes=1000.* in dit-s-2, .*classes=10,.* in dit-fashion"),
        ("diffit-image-32", "prediction: epsilon, learned variance in dit-s-2, denoised image"),
        ("dit-xl-2-512", r"different states: \['B', 4, 32, 32\] and \['B', 4, 64, 64\]"),
        ("sd-vae-decoder", "sd-vae-decoder plays no role denoiser"),
    ],
)
def test_denoisers_that_cannot_share_a_trajectory(tmp_path: Path, other: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        dexport.build(None, tmp_path / "out", stitch=f"dit-s-2:0.4,{other}:0.6")
    assert list(tmp_path.iterdir()) == []


def test_one_checkpoint_for_several_denoisers_is_refused(tmp_path: Path) -> None:
    for options in ({"checkpoint": "dit.pt"}, {"init_from": "dit.pt"}):
        with pytest.raises(UsageError, match="do not say which denoiser"):
            dexport.build(None, tmp_path / "out", stitch="dit-s-2:0.4,dit-xl-2:0.6", **options)


@pytest.fixture(scope="module")
def stitched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One denoiser built here, three shares, one of them joined."""
    folder = tmp_path_factory.mktemp("stitched")
    dexport.build("lit-fashion", folder / "joined", settings=NARROW, parity=False)
    spec = f"dit-fashion-s:0.2,{folder / 'joined'}:0.3,dit-fashion:0.5"
    result = dexport.build(None, folder / "out", stitch=spec, settings=NARROW, profile="ci")
    assert [name for name, verdicts in result.verdicts.items() if verdicts] == ["denoiser.0", "denoiser.2"]
    return folder / "out"


def test_a_stitched_bundle_holds_every_network(stitched: Path) -> None:
    bundle, joined = load_bundle(stitched), load_bundle(stitched.parent / "joined")
    assert [(network.name, network.manifest["name"]) for network in bundle.networks.values()] == [
        ("denoiser.0", "dit-fashion-s"),
        ("denoiser.1", "lit-fashion"),
        ("denoiser.2", "dit-fashion"),
    ]
    assert bundle.manifest["program"]["route"] == [{"share": share, "every": None} for share in (0.2, 0.3, 0.5)]
    assert OpenProgram(bundle).program.shares == [0.2, 0.3, 0.5]
    assert bundle.manifest["status"] == "not verified"  # as the one that was joined
    assert all(network.manifest["weights"]["random"] for network in bundle.networks.values())
    copied = bundle.networks["denoiser.1"]
    assert copied.manifest == joined.network.manifest
    files = bundle.manifest["files"]
    assert {name: files[f"{copied.folder}/{name}"] for name in joined.manifest["files"]} == joined.manifest["files"]


def test_a_changed_part_is_found_by_the_whole(stitched: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stitched, copy)
    file = copy / "networks" / "denoiser.1" / "model.onnx"
    file.write_bytes(file.read_bytes().replace(b"lit-fashion", b"dit-fashion"))
    with pytest.raises(InputError, match=r"networks/denoiser\.1/model\.onnx"):
        load_bundle(copy)


def test_names_of_classes_need_not_agree(tmp_path: Path) -> None:
    recipe = find_recipe("dit-fashion")
    assert recipe.sampling is not None
    nameless = replace(recipe, sampling=replace(recipe.sampling, class_names=()))
    dexport.build(nameless, tmp_path / "nameless", settings=NARROW, parity=False)
    spec = f"{tmp_path / 'nameless'}:0.4,dit-fashion:0.6"
    result = dexport.build(None, tmp_path / "out", stitch=spec, settings=NARROW, parity=False)
    assert OpenProgram(result.bundle).condition.names == CLASSES


def test_a_stitched_bundle_cannot_be_stitched_again(stitched: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a single denoiser"):
        dexport.build(None, tmp_path / "out", stitch=f"{stitched}:0.4,dit-fashion:0.6")


def test_a_bad_checkpoint_of_the_last_part_is_found_before_the_first_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("a denoiser was built")

    monkeypatch.setattr("dexport.exporter.network_build.export_onnx", work)
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    spec = f"dit-fashion-s:0.4,dit-fashion={tmp_path / 'bad.safetensors'}:0.6"
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        dexport.build(None, tmp_path / "out", stitch=spec, settings=NARROW, parity=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize(
    ("seed", "shown"), [(0, "RANDOM weights of denoiser.0 (seed 0)"), (7, "RANDOM weights of denoiser.1 (seed 7)")]
)
def test_a_stitched_build_with_random_weights_says_so(seed: int, shown: str, tmp_path: Path) -> None:
    sizes = [part for name, value in NARROW.items() for part in ("--set", f"{name}={value}")]
    command = ["build", "--stitch", "dit-fashion-s:0.4,dit-fashion:0.6", *sizes, "--no-parity", "--seed", str(seed)]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert shown in result.stdout


def test_random_weights_of_several_seeds(tmp_path: Path) -> None:
    for seed in (1, 2):
        dexport.build("dit-fashion-s", tmp_path / str(seed), settings=NARROW, seed=seed, parity=False)
    result = dexport.build(None, tmp_path / "out", stitch=f"{tmp_path / '1'}:0.4,{tmp_path / '2'}:0.6")
    assert [network.manifest["weights"]["seed"] for network in result.bundle.networks.values()] == [1, 2]
    with out.capture() as captured:
        print_result(result)
    for name, seed in (("denoiser.0", 1), ("denoiser.1", 2)):
        assert f"RANDOM weights of {name} (seed {seed}): this is not a trained model" in captured.get()
