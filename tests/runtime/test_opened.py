"""Programs of bundles: sampler, guidance, shares and decoder come from the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dexport
from dexport.bundle import Bundle, load_bundle
from dexport.contract import Route
from dexport.errors import GateError, InputError, UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import Rule, guided
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import LATENTS, PICTURES, Request, check_condition
from dexport.runtime.samplers import make_sampler, sample
from dexport.validate.metrics import compare
from tests.bundles import build_narrow
from tests.runtime.running import STEPS, latents, with_session

LABELS = [3, 7]
NULL = 10


def test_the_manifest_says_how_to_sample(plain: Path) -> None:
    assert load_bundle(plain).manifest["program"] == {
        "kind": "diffusion",
        "condition": {
            "kind": "class",
            "classes": 10,
            "names": [
                "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
            ],
            "null": NULL,
        },
        "schedule": "linear betas 1e-4..2e-2, 1000 steps",
        "prediction": "epsilon, learned variance",
        "sampler": "ddpm",
        "steps": 50,
        "cfg_scale": 2.0,
        "guidance": {"channels": 4, "power": None},
        "decoding": {"kind": "pixel-shuffle", "recipe": "", "scale": 1.0, "black": -1.0, "factor": 2, "tiles": 1},
        "route": [],
    }  # fmt: skip


def test_a_program_is_the_sampler_around_the_session(plain: Path) -> None:
    by_hand = sample(
        make_sampler("ddpm", STEPS),
        guided(dexport.load(plain), LABELS, 3.0, NULL, Rule(channels=4)),
        Draws(0, images=[0, 1]),
        (2, 4, 16, 16),
    )
    np.testing.assert_array_equal(latents(OpenProgram.open(plain), cfg_scale=3.0), by_hand.astype(np.float32))


def test_the_last_step_has_the_results(plain: Path) -> None:
    program = OpenProgram.open(plain).with_settings(steps=STEPS)
    steps = list(program.run(Request(2, (3, 7)), Draws(0, images=[0, 1])))
    assert [step.index for step in steps] == list(range(STEPS))
    assert [step.time for step in steps] == [999, 666, 333, 0]
    assert [list(step.results) for step in steps] == [[]] * (STEPS - 1) + [[LATENTS, PICTURES]]
    np.testing.assert_array_equal(steps[-1].results[LATENTS], steps[-1].state.astype(np.float32))


def test_pictures_are_what_the_program_says_it_makes(plain: Path) -> None:
    program = OpenProgram.open(plain).with_settings(steps=2)
    assert program.makes == {LATENTS: (4, 16, 16), PICTURES: (32, 32, 1)}
    pictures = program.results(Request(1, (3,)), Draws(0, images=[0]))[PICTURES]
    assert (pictures.shape, pictures.dtype) == ((1, 32, 32, 1), np.uint8)


def test_a_fused_bundle_gives_the_same_latents(plain: Path, fused: Path) -> None:
    on_host, in_graph = (latents(OpenProgram.open(path), cfg_scale=3.0) for path in (plain, fused))
    assert compare(on_host, in_graph).relative_l2 < 1e-5


def test_default_scale_is_the_systems(plain: Path) -> None:
    program = OpenProgram.open(plain)
    np.testing.assert_array_equal(latents(program), latents(program, cfg_scale=2.0))


@pytest.mark.parametrize("label", [-1, 10, 1000])
def test_labels_that_the_model_does_not_have(plain: Path, label: int) -> None:
    with pytest.raises(UsageError, match=f"no class {label}: the model has 10") as refused:
        latents(OpenProgram.open(plain), [label])
    assert "0 to 9" in refused.value.hint


def test_guidance_without_a_null_class(tmp_path: Path) -> None:
    settings = {"hidden_size": 16, "depth": 1, "num_heads": 2, "class_dropout_prob": 0}
    dexport.build("dit-fashion", tmp_path / "b", settings=settings, parity=False)
    program = OpenProgram.open(tmp_path / "b")
    assert program.program.values["cfg_scale"] == 1
    assert latents(program).shape == (2, 4, 16, 16)
    with pytest.raises(UsageError, match="needs a null class"):
        program.with_settings(cfg_scale=2.0)


def test_an_unconditional_network_in_pixel_space(tmp_path: Path) -> None:
    settings = {"channels": 16, "num_heads": 2, "num_blocks": [1, 1, 1]}
    dexport.build("diffit-image-32", tmp_path / "b", settings=settings, parity=False)
    program = OpenProgram.open(tmp_path / "b")
    assert program.classes is None
    results = program.with_settings(steps=2).results(Request(1), Draws(0, images=[0]))
    assert (results[LATENTS].shape, results[LATENTS].dtype) == ((1, 3, 32, 32), np.float32)
    assert results[PICTURES].shape == (1, 32, 32, 3)
    with pytest.raises(UsageError, match="null class"):
        program.with_settings(cfg_scale=2.0)
    with pytest.raises(UsageError, match="is unconditional"):
        check_condition(program.condition, Request(1, (1,)))


def test_samplers_that_share_the_schedule(plain: Path) -> None:
    program = OpenProgram.open(plain)
    assert program.with_settings(sampler="ddim", steps=5).program.values["sampler"] == "ddim"
    for name in ("edm", "flow", "dpm-solver"):
        with pytest.raises(UsageError, match=f"{name!r} does not share"):
            program.with_settings(sampler=name)
    with pytest.raises(UsageError, match="no sampler 'euler'"):
        program.with_settings(sampler="euler")


@pytest.mark.parametrize("steps", [1, 1001])
def test_steps_outside_of_the_schedule(plain: Path, steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} steps were asked for"):
        OpenProgram.open(plain).with_settings(steps=steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 4}, "no setting 'step'"),
        ({"steps": "many"}, "steps 'many'"),
        ({"cfg_scale": float("nan")}, "cfg_scale nan"),
        ({"cfg_scale": 0.5}, "cfg_scale 0.5"),
        ({"route": (Route(0.4), Route(0.4))}, "do not share out"),
    ],
)
def test_settings_that_there_are_not(plain: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        OpenProgram.open(plain).with_settings(**settings)
    assert refused.value.hint


def test_latents_without_a_decoder(tmp_path: Path) -> None:
    program = OpenProgram.open(build_narrow(tmp_path / "b", "dit-s-2"))
    assert list(program.makes) == [LATENTS]
    with pytest.raises(UsageError, match="has no decoder") as refused:
        program.check_pictures()
    assert "--with-decoder" in refused.value.hint
    assert list(program.with_settings(steps=2).results(Request(1, (3,)), Draws(0, images=[0]))) == [LATENTS]


def test_a_bundle_without_a_program(plain: Path) -> None:
    bundle = load_bundle(plain)
    with pytest.raises(InputError, match="has no program"):
        OpenProgram(Bundle(plain, {**bundle.manifest, "program": None}))


def test_networks_are_opened_when_they_are_called(plain: Path) -> None:
    opened: list[tuple[str, str]] = []

    def open_graph(network: object, graph: str) -> object:
        opened.append((network.name, graph))  # type: ignore[attr-defined]
        return dexport.load(plain)

    program = OpenProgram(load_bundle(plain), open_graph=open_graph)
    program.with_settings(steps=3).rehearse()
    assert opened == []
    program.load()
    latents(program)
    assert opened == [("denoiser", "model")]


@pytest.mark.parametrize("role", ["decoder", "judge"])
def test_players_that_cannot_play(plain: Path, role: str) -> None:
    with pytest.raises(UsageError, match=r"a decoder takes a latent|has no role judge"):
        OpenProgram.open(plain, players={role: plain})


# Several denoisers


def fractions(*shares: float) -> tuple[Route, ...]:
    return tuple(map(Route, shares))


def test_the_ends_of_a_stitched_bundle_are_its_networks(plain: Path, other: Path, stitched: Path) -> None:
    program = OpenProgram.open(stitched)
    np.testing.assert_array_equal(latents(program, route=fractions(1.0, 0.0)), latents(OpenProgram.open(plain)))
    np.testing.assert_array_equal(latents(program, route=fractions(0.0, 1.0)), latents(OpenProgram.open(other)))


def test_a_stitched_bundle_samples_with_its_own_shares(stitched: Path) -> None:
    program = OpenProgram.open(stitched)
    assert program.program.values["route"] == ({"share": 0.4, "every": None}, {"share": 0.6, "every": None})
    between = latents(program)
    np.testing.assert_array_equal(between, latents(program, route=fractions(0.4, 0.6)))
    assert not np.array_equal(between, latents(program, route=fractions(0.0, 1.0)))


def test_shares_for_a_single_denoiser(plain: Path) -> None:
    with pytest.raises(UsageError, match="1 denoisers and 2 fractions"):
        OpenProgram.open(plain).with_settings(route=fractions(0.5, 0.5))


def test_a_stitched_bundle_is_not_one_session(stitched: Path) -> None:
    with pytest.raises(UsageError, match="2 networks of the role denoiser") as refused:
        dexport.load(stitched)
    assert "--network denoiser.0" in refused.value.hint
    assert dexport.load(stitched, network="denoiser.1").outputs == ["out"]


@pytest.mark.parametrize(("scale", "largest"), [(None, 2), (1.0, 4)])
def test_an_engine_limits_the_batch_and_guidance_halves_it(plain: Path, scale: float | None, largest: int) -> None:
    program = OpenProgram.open(plain).with_settings(cfg_scale=scale)
    assert program.largest_batch() is None
    program._provider = "tensorrt"
    assert program.largest_batch() == largest


def test_black_pictures_are_never_made_of_nan(plain: Path) -> None:
    def broken(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"out": np.full((len(inputs["x"]), 8, 16, 16), np.nan, np.float32)}

    with pytest.raises(GateError, match="not finite"):
        latents(with_session(plain, broken))
