"""Absurd sizes: a message, before anything is allocated."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dexport import limits
from dexport.cli import main
from dexport.contract import GuidanceRule, from_json
from dexport.errors import InputError, UsageError
from dexport.exporter.options import BuildOptions
from dexport.exporter.quantize.calibrate import Calibration
from dexport.exporter.recipes import find_recipe
from dexport.exporter.resolve import resolve_network
from dexport.exporter.variant import parse_settings, resolve
from dexport.graphs.layers import sincos_table
from dexport.graphs.rotary import rotary_tables
from dexport.limits import check_pictures, check_setting, check_whole, shown
from dexport.profiles import load_profile
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import find_rule
from dexport.runtime.samplers import EDM, SAMPLERS, FlowEuler, make_sampler

HUGE = 10**9
BEYOND = str(2**63)
SECONDS = 30
"""On a busy machine; what is refused takes a fraction of one."""


def run(*arguments: object) -> Any:
    started = time.perf_counter()
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert time.perf_counter() - started < SECONDS
    return result


@pytest.mark.parametrize(
    "options",
    [
        ("--count", HUGE),
        ("--count", 200_000),
        ("--count", BEYOND),
        ("--batch", HUGE),
        ("--batch", -1),
        ("--steps", HUGE),
        ("--steps", BEYOND),
        ("--seed", BEYOND),
        ("--seed", 10**40),
        ("--seed", -1),
        ("--cfg", "nan"),
        ("--cfg", "inf"),
        ("--cfg", "1e300"),
        ("--cfg", "-1"),
        ("--stitch-fraction", "nan"),
        ("--classes", "9" * 5000),
        ("--classes", BEYOND),
    ],
)
def test_options_of_sample(options: tuple[Any, ...], plain: Path, tmp_path: Path) -> None:
    result = run("sample", plain, "-o", tmp_path / "out.png", *options)
    assert result.exit_code == UsageError.exit_code, result.output
    assert "rror: " in result.stderr and len(result.stderr) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--count", HUGE),
        ("--batch", HUGE),
        ("--batch", 0),
        ("--count", 0),
        ("--steps", HUGE),
        ("--seed", BEYOND),
        ("--cfg", "nan"),
        ("--fractions", "0,nan"),
        ("--fractions", "1e400"),
    ],
)
def test_options_of_sweep(options: tuple[Any, ...], stitched: Path, tmp_path: Path) -> None:
    result = run("sweep", stitched, "-o", tmp_path / "sweep.json", *options)
    assert result.exit_code == UsageError.exit_code, result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("validate", ("--level", "distribution", "--count", HUGE)),
        ("validate", ("--steps", HUGE)),
        ("validate", ("--seed", BEYOND)),
        ("bench", ("--batch", HUGE)),
        ("bench", ("--threads", HUGE)),
        ("bench", ("--rounds", HUGE)),
        ("diff", ("--seed", BEYOND)),
        ("fid", ("--batch", HUGE)),
        ("fid", ("--seed", BEYOND)),
        ("quantize", ("-o", "out", "--quantize", "w8a8", "--calibration-images", HUGE)),
        ("quantize", ("-o", "out", "--quantize", "w8a8", "--calibration-seed", BEYOND)),
    ],
)
def test_options_of_other_commands(command: str, options: tuple[Any, ...], plain: Path) -> None:
    result = run(command, plain, *options)
    assert result.exit_code == UsageError.exit_code, result.output
    assert "is out of range" in result.stderr


@pytest.mark.parametrize("size", ["nan", "inf", "1e300"])
def test_the_size_of_the_cache(size: str) -> None:
    assert run("cache", "prune", "--keep-gb", size).exit_code == UsageError.exit_code


@pytest.mark.parametrize(
    "options",
    [
        ("--image-size", HUGE),
        ("--image-size", 8 * 10**15),
        ("--image-size", 2**64),
        ("--image-size", 65_536),
        ("--latent", "100000x100000"),
        ("--latent", "1x99999999"),
        ("--latent", "9" * 5000 + "x8"),
        ("--latent", "8x" + "9" * 30),
        ("--seed", BEYOND),
        ("--fold-steps", HUGE),
        ("--set", "depth=" + "[" * 10_000 + "]" * 10_000),
        ("--set", "depth=" + "[" * 100 + "]" * 100),
        ("--set", 'depth={"a":' * 1 + '{"a":' * 9_999 + "1" + "}" * 10_000),
        ("--set", "depth=1000000000"),
        ("--set", "depth=" + "9" * 4000),
        ("--set", "depth=" + "9" * 5000),
        ("--set", "hidden_size=4000000000"),
        ("--set", "hidden_size=1e308"),
        ("--set", "mlp_ratio=1e308"),
        ("--set", "mlp_ratio=1e400"),
        ("--set", "class_dropout_prob=NaN"),
        ("--set", "class_dropout_prob=-Infinity"),
        ("--set", "num_classes=" + "9" * 30),
        ("--set", "input_size=1000000000"),
        ("--set", "input_size=" + "9" * 400),
        ("--set", "patch_size=NaN"),
    ],
)
def test_options_of_build(options: tuple[Any, ...], tmp_path: Path) -> None:
    result = run("build", "dit-s-2", "-o", tmp_path / "out", *options)
    assert result.exit_code == UsageError.exit_code, result.output[-2000:]
    assert len(result.stderr) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("images", [HUGE, 10**30])
def test_images_to_calibrate_on(images: int) -> None:
    with pytest.raises(UsageError, match="calibration-images"):
        Calibration(images)
    with pytest.raises(UsageError, match="calibration-images"):
        resolve_network(find_recipe("dit-s-2"), BuildOptions(Path("out"), int8="w8a8", calibration_images=images))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("dico-s", {"depth": [HUGE, 1, 1, 1, 1]}),
        ("dico-s", {"depth": [1, 1, 1, 1, 10**40]}),
        ("terdit-600m", {"n_layers": HUGE}),
        ("diffit-256", {"depth": HUGE}),
        ("diffit-image-32", {"num_blocks": [HUGE, 1, 1]}),
        ("terdit-600m", {"dim": HUGE * 4}),
        ("lit-fashion", {"hidden_size": 2**40}),
        ("dit-s-2", {"class_dropout_prob": float("nan")}),
    ],
)
def test_networks_that_no_machine_holds(recipe: str, settings: dict[str, Any]) -> None:
    started = time.perf_counter()
    with pytest.raises(UsageError):
        resolve(find_recipe(recipe), settings)
    assert time.perf_counter() - started < SECONDS


@pytest.mark.parametrize("patch", [0, -1, 1.5, "a", None, [1]])
def test_pixels_of_a_cell(patch: Any) -> None:
    with pytest.raises(UsageError):
        resolve_network(
            find_recipe("vitok-v1-s-b-1x16-decoder"),
            BuildOptions(Path("out"), settings={"patch_size": patch}, image_size=256),
        )


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [HUGE, 10**30, 0, -5])
def test_steps_of_samplers(name: str, steps: int) -> None:
    with pytest.raises(UsageError):
        make_sampler(name, steps)


def test_samplers_take_what_is_usual() -> None:
    assert EDM(limits.MOST_STEPS).steps == FlowEuler(limits.MOST_STEPS).steps == limits.MOST_STEPS
    with pytest.raises(UsageError, match="flow shift"):
        FlowEuler(4, shift=float("nan"))


@pytest.mark.parametrize(
    "power", ["abc", "", math.nan, math.inf, -1, 0, limits.LARGEST_POWER * 2, 1e9, "9" * 5000, 10**400]
)
def test_powers_of_a_guidance(power: Any) -> None:
    with pytest.raises(InputError, match=r"power") as refused:
        from_json(GuidanceRule, {"channels": 3, "power": power}, "guidance")
    assert len(str(refused.value)) < 1500


def test_names_of_guidance_rules_are_bounded() -> None:
    with pytest.raises(UsageError, match="no guidance rule") as refused:
        find_rule("x" * 10_000)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(("key", "value"), [("max = 8", HUGE), ("max = 8", 10**40), ("workspace_mib = 512", 10**30)])
def test_profiles(key: str, value: int, tmp_path: Path) -> None:
    text = "[batch]\nmin = 1\nopt = 3\nmax = 8\n[engine]\nworkspace_mib = 512\n"
    (tmp_path / "p.toml").write_text(text.replace(key, f"{key.split()[0]} = {value}"))
    with pytest.raises(UsageError) as refused:
        load_profile(tmp_path / "p.toml")
    assert "is the most" in refused.value.hint


def test_tables_are_refused_before_their_memory_is_taken() -> None:
    for make in (lambda: sincos_table(1152, 10**6, 10**6), lambda: rotary_tables(64, 10**12)):
        with pytest.raises(ValueError, match="a table of"):
            make()


@pytest.mark.parametrize("value", [2**63 - 1, 0])
def test_whole_numbers_within_a_limit(value: int) -> None:
    assert check_whole("--seed", value, limits.LARGEST_SEED) == value
    assert Draws(value, [0]).normal((1, 2)).shape == (1, 2)


@pytest.mark.parametrize("value", [2**63, -1, 1.0, True, "1", None, 2**200])
def test_other_numbers_are_named_shortly(value: Any) -> None:
    with pytest.raises(UsageError) as refused:
        check_whole("--seed", value, limits.LARGEST_SEED)
    assert str(refused.value).startswith("--seed ") and len(str(refused.value)) < 100


def test_pictures_are_counted_over_all_classes() -> None:
    check_pictures(1000, 50)
    for labels, count in ((1000, 1001), (1, HUGE), (1, 0)):
        with pytest.raises(UsageError, match="--count"):
            check_pictures(labels, count)


def test_settings_are_bounded_wherever_a_number_is() -> None:
    for value in (1, -2.5, "a", None, True, [1, [2, {"a": 3}]]):
        check_setting(value)
    for value in (
        2**60,
        1e300,
        float("nan"),
        [1, [2**60]],
        {"a": {"b": float("inf")}},
        json.loads("[" * 50 + "]" * 50),
    ):
        with pytest.raises(ValueError, match=r"too large|nested|no number"):
            check_setting(value)
    with pytest.raises(UsageError, match="nested too deep"):
        parse_settings(("a=" + "[" * 100_000,))
    assert len(shown("x" * 10_000)) < 100
