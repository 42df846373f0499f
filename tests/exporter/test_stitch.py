"""Stitched bundles: what may be joined, and what is refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from dexport.exporter.stitch import Share, build_stitched, parse_stitch

import dexport
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.cli.commands.build_printer import print_result
from dexport.cli.terminal import out
from dexport.errors import InputError, UsageError
from dexport.exporter.build import BuildOptions

NARROW = {"hidden_size": 16, "depth": 1, "num_heads": 2}


def refuse_to_verify(_case: object) -> None:
    pytest.fail("nothing may be built")


def test_shares_with_checkpoints() -> None:
    assert parse_stitch("dit-s-2=hf://a/b@c/small.pt:0.4,dit-xl-2:0.6") == [
        Share("dit-s-2", "hf://a/b@c/small.pt", 0.4),
        Share("dit-xl-2", None, 0.6),
    ]


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
        ("dit-fashion", "classes: 1000 in 0-dit-s-2, 10 in 1-dit-fashion"),
        ("diffit-image-32", "prediction: 'epsilon, learned variance' in 0-dit-s-2, 'denoised image'"),
        ("dit-xl-2-512", r"latent: \[4, 32, 32\] in 0-dit-s-2, \[4, 64, 64\] in 1-dit-xl-2-512"),
    ],
)
def test_denoisers_that_cannot_share_a_trajectory(tmp_path: Path, other: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        build_stitched(parse_stitch(f"dit-s-2:0.4,{other}:0.6"), BuildOptions(tmp_path / "out"), refuse_to_verify)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_one_checkpoint_for_several_denoisers_is_refused(tmp_path: Path) -> None:
    options = BuildOptions(tmp_path / "out", checkpoint="dit.pt")
    with pytest.raises(UsageError, match="do not say which denoiser"):
        build_stitched(parse_stitch("dit-s-2:0.4,dit-xl-2:0.6"), options, refuse_to_verify)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stitched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One denoiser built here, three shares, one of them joined."""
    folder = tmp_path_factory.mktemp("stitched")
    dexport.build("lit-fashion", folder / "joined", settings=NARROW, parity=False)
    spec = f"dit-fashion-s:0.2,{folder / 'joined'}:0.3,dit-fashion:0.5"
    result = dexport.build(None, folder / "out", stitch=spec, settings=NARROW, profile="ci")
    assert [name for name, verdict in result.parts.items() if verdict] == ["0-dit-fashion-s", "2-dit-fashion"]
    return folder / "out"


def test_a_stitched_bundle_holds_whole_bundles(stitched: Path) -> None:
    bundle = load_bundle(stitched)
    assert [(part.path.name, fraction) for part, fraction in bundle.stitch] == [
        ("0-dit-fashion-s", 0.2),
        ("1-joined", 0.3),
        ("2-dit-fashion", 0.5),
    ]
    assert bundle.manifest["status"] == "not verified"  # as the one that was joined
    assert bundle.network.manifest["weights"]["random"]
    for part, _ in bundle.stitch:
        assert load_bundle(part.path).manifest == part.manifest


def test_a_changed_part_is_found_by_the_whole(stitched: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stitched, copy)
    file = copy / "parts" / "1-joined" / "manifest.json"
    file.write_text(file.read_text().replace("not verified", "passed"))
    with pytest.raises(InputError, match=r"parts/1-joined/manifest\.json"):
        load_bundle(copy)


def test_a_stitched_bundle_cannot_be_stitched_again(stitched: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a single denoiser"):
        dexport.build(None, tmp_path / "out", stitch=f"{stitched}:0.4,dit-fashion:0.6")


def test_a_bad_checkpoint_of_the_last_part_is_found_before_the_first_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("a denoiser was built")

    monkeypatch.setattr("dexport.exporter.build.export_onnx", work)
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    spec = f"dit-fashion-s:0.4,dit-fashion={tmp_path / 'bad.safetensors'}:0.6"
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        dexport.build(None, tmp_path / "out", stitch=spec, settings=NARROW, parity=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize(("seed", "shown"), [(0, "RANDOM weights (seed 0)"), (7, "RANDOM weights (seed 7)")])
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
    assert result.bundle.network.manifest["weights"] == {"random": True, "seed": None}
    with out.capture() as captured:
        print_result(result)
    assert "RANDOM weights: this is not a trained model" in captured.get()
