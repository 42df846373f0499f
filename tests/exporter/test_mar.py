"""MAR from the build to the latents: the official loops, with and without ReCAP, through ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import dexport
from dexport.bundle import MODEL_DATA, graph_file, load_bundle
from dexport.cli import main
from dexport.contract import Condition
from dexport.errors import UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.runtime.calls import rehearse
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.masked_diffusion import MaskedDiffusion
from dexport.runtime.programs.program import LATENTS, PICTURES, Request
from tests.golden import Golden, assert_golden, load_golden
from tests.graphs.test_mar import SMALL
from tests.mar_draws import official_draws

PLAIN, RECAP = load_golden("mar-sample-loop"), load_golden("recap-mar-loop")
THROUGH_ONNX = 5e-5


def build(folder: Path, golden: Golden, inner_steps: int = 1, **options: Any) -> Path:
    """A bundle with the golden's weights."""
    save_file(golden.weights, folder / "weights.safetensors")
    options = {"checkpoint": str(folder / "weights.safetensors"), "profile": "ci", **options}
    dexport.build("mar-b", folder / "bundle", settings={**golden.config, "inner_steps": inner_steps}, **options)
    return folder / "bundle"


def opened(path: Path, golden: Golden) -> OpenProgram:
    """The bundle's program with the settings of the golden."""
    facts = golden.metadata
    settings: dict[str, Any] = {
        "steps": int(facts["num_iter"]),
        "cfg_scale": float(facts["cfg"]),
        "cfg_schedule": facts["cfg_schedule"],
        "temperature": float(facts["temperature"]),
    }
    if "pre_full_iters" in facts:
        settings["recap"] = f"{facts['pre_full_iters']}:{facts['num_cache_iters']}"
        settings["light_respacing"] = facts["light_respacing"]
    return OpenProgram.open(path).with_settings(**settings)


def replayed(program: OpenProgram, golden: Golden) -> np.ndarray:
    assert isinstance(program.program, MaskedDiffusion)
    request = Request(2, tuple(golden.inputs["labels"].tolist()))
    return program.results(request, Replay(official_draws(golden, program.program)))[LATENTS]


@pytest.fixture(scope="module")
def recap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("recap"), RECAP, 2, graphs=("full", "light", "diffloss"))


@pytest.mark.golden
def test_the_official_loop_with_recap_through_onnx(recap: Path) -> None:
    assert load_bundle(recap).status == "passed"
    program = opened(recap, RECAP)
    kinds = [call.graph for call in program.rehearse() if call.graph != "diffloss"]
    assert str(kinds).replace("'", '"') == RECAP.metadata["call_kinds"]
    assert_golden(replayed(program, RECAP), RECAP.outputs["latent"].numpy(), THROUGH_ONNX)


@pytest.mark.golden
def test_the_official_loop_and_network_through_onnx(tmp_path: Path) -> None:
    program = opened(build(tmp_path, PLAIN, graphs=("model", "diffloss"), parity=False), PLAIN)
    assert_golden(replayed(program, PLAIN), PLAIN.outputs["latent"].numpy(), THROUGH_ONNX)


def test_ports_are_named_as_in_the_goldens() -> None:
    _, networks = program_and_graphs()
    ports = {
        name: ([port.name for port in graph.inputs], [port.name for port in graph.outputs])
        for name, graph in networks["transformer"][0].items()
    }
    transformer = ["tokens", "mask", "labels"]
    memories = ["encoder_kv", "decoder_kv"]
    assert ports == {
        "model": (transformer, ["z"]),
        "full": (transformer, ["z", *memories]),
        "light": ([*transformer, "positions", *memories], ["z"]),
        "diffloss": (["x", "t", "c", "cfg_scale", "noise", "weights"], ["sample"]),
    }


def stored(path: Path) -> set[tuple[str, int]]:
    """Where the weights of a graph lie in the file that all share, and how long they are."""
    weights = onnx.load(path, load_external_data=False).graph.initializer
    entries = [{entry.key: entry.value for entry in weight.external_data} for weight in weights]
    return {(entry["offset"], int(entry["length"])) for entry in entries if entry}


def test_the_light_graph_adds_nothing_to_the_weights_file(recap: Path) -> None:
    held = {name: stored(recap / graph_file(name)) for name in load_bundle(recap).network.graphs}
    assert held["light"] <= held["full"]
    whole = sum(length for _, length in held["full"] | held["diffloss"])
    assert whole <= (recap / MODEL_DATA).stat().st_size < 1.02 * whole  # some weights are aligned
    assert all((recap / graph_file(name)).stat().st_size < 100_000 for name in held)


def test_draws_that_were_recorded_are_replayed(recap: Path) -> None:
    program = opened(recap, RECAP).with_settings(cfg_scale=1.0, steps=7, recap="2:2")
    draws = Draws(3, images=[0, 1], record=True)
    first = program.results(Request(2, (1, 2)), draws)[LATENTS]
    np.testing.assert_array_equal(program.results(Request(2, (1, 2)), Replay(draws.draws))[LATENTS], first)
    alone = program.results(Request(1, (2,)), Draws(3, images=[1]))[LATENTS]
    assert_golden(alone, first[1:], 1e-5)


def test_its_trajectory_is_that_of_pytorch(recap: Path) -> None:
    options = ("--level", "trajectory", "--steps", "5", "--recap", "1:1", "--setting", "respacing=ddim4")
    report = json.loads(run("validate", recap, "--json", "--no-record", *options).stdout)
    assert report["verdict"] == "passed"
    assert [round(state["t"], 6) for state in report["trajectory"]["states"]] == [
        round(masked / 36, 6) for masked in (34, 29, 21, 11, 0)
    ]
    assert report["trajectory"]["states"][-1]["snr_db"] > 100


def test_without_a_decoder_sample_writes_latents(recap: Path, tmp_path: Path) -> None:
    options = ("--classes", "1,7", "--steps", "4", "--recap", "1:1", "--temperature", "0.9", "--setting", "respacing=4")
    shown = run("sample", recap, "-o", tmp_path / "latents.npy", *options).stdout
    assert "latents [2, 8, 6, 6]" in shown and "4 steps of 4 inner ones, cfg 2.9 linear, recap 1:1" in shown
    made = np.load(tmp_path / "latents.npy")
    assert made.shape == (2, 8, 6, 6) and np.isfinite(made).all()


def test_steps_outside_of_groups_need_no_memories() -> None:
    program, networks = program_and_graphs()
    calls = [call.graph for call in rehearse(program.with_settings(steps=6, recap="3:1"), networks)]
    assert [graph for graph in calls if graph != "diffloss"] == ["model", "model", "model", "full", "light", "model"]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_setting_without_a_value_is_refused(recap: Path) -> None:
    result = CliRunner().invoke(main, ["sample", str(recap), "--setting", "respacing"])
    assert result.exit_code == 2 and "is not NAME=VALUE" in result.output


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"recap": "12"}, "PRE_FULL:NUM_CACHE"),
        ({"recap": "0:9", "steps": 36}, None),
        ({"steps": 37}, "more than there are tokens, 36"),
        ({"respacing": "ddim999"}, "no whole stride"),
        ({"light_respacing": "1"}, "fewer than 2"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule"),
        ({"temperature": -1.0}, "temperature"),
        ({"sampler": "ddim"}, "no setting"),
    ],
)
def test_settings_that_cannot_be_are_refused(recap: Path, settings: Mapping[str, Any], reason: str | None) -> None:
    program = OpenProgram.open(recap)
    if reason is None:
        program.with_settings(**settings)
        return
    with pytest.raises(UsageError, match=reason):
        program.with_settings(**settings)


def program_and_graphs(graphs: tuple[str, ...] = (), **changes: Any) -> tuple[MaskedDiffusion, Any]:
    variant = resolve(find_recipe("mar-b"), {**SMALL, **changes}, graphs=graphs)
    assert variant.recipe.program is not None
    program = variant.recipe.program(variant.config, variant.signatures)
    assert isinstance(program, MaskedDiffusion)
    return program, {"transformer": [{name: each.graph for name, each in variant.signatures.items()}]}


def test_recap_needs_the_light_graph_and_room_for_its_groups() -> None:
    program, networks = program_and_graphs(("model", "diffloss"))
    with pytest.raises(UsageError, match="recap needs the graphs full and light, and there are model, diffloss"):
        program.with_settings(recap="2:1").check(networks)
    program, networks = program_and_graphs(light_tokens=8)
    program.with_settings(recap="2:1").check(networks)
    with pytest.raises(UsageError, match=r"groups of \d+ tokens, and the graph light takes 8"):
        program.with_settings(recap="2:1", steps=8).check(networks)


def test_a_program_without_a_null_label_is_refused() -> None:
    with pytest.raises(UsageError, match="no null label"):
        MaskedDiffusion(condition=Condition("class", 4), steps=4)


def test_sizes_follow_the_image_and_the_patch() -> None:
    program, networks = program_and_graphs(patch_size=2, vae_embed_dim=4)
    assert networks["transformer"][0]["model"].inputs[0].shape == ("B", 9, 16)
    assert program.makes(networks) == {LATENTS: (4, 6, 6)}
    variant = resolve(find_recipe("mar-b"), latent=(32, 32))
    assert (variant.config["img_size"], variant.signature.inputs[0].shape) == (512, ("B", 1024, 16))
    with pytest.raises(UsageError, match="img_size"):
        resolve(find_recipe("mar-b"), {"img_size": 100})


@pytest.mark.golden
def test_tokens_become_latents_as_officially() -> None:
    golden = load_golden("mar-transformer")
    program, _ = program_and_graphs()
    assert np.array_equal(program._latents(golden.outputs["patchified"].numpy()), golden.inputs["latent_image"].numpy())


def test_a_patch_holds_channels_then_rows_then_columns() -> None:
    program, _ = program_and_graphs(patch_size=2, vae_embed_dim=1)
    latents = program._latents(np.arange(16.0, dtype=np.float32).reshape(1, 4, 4))
    assert latents[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.slow  # twenty seconds; each part is tried above
def test_half_precision_and_a_decoder(tmp_path: Path) -> None:
    save_file(RECAP.weights, tmp_path / "weights.safetensors")
    path = build(tmp_path, RECAP, 10, precision="fp16")
    network = load_bundle(path).network
    assert network.manifest["status"] == "passed"
    for name, dtype in network.entry("diffloss")["nodes"].items():
        if name.startswith(("diffloss.sampler/", "diffloss.net.time_embed.")):
            assert dtype == "float32", name
    error = np.linalg.norm(replayed(opened(path, RECAP), RECAP) - RECAP.outputs["latent"].numpy())
    assert error < 3e-3 * np.linalg.norm(RECAP.outputs["latent"].numpy())


@pytest.mark.slow  # ten seconds for the decoder alone
def test_with_its_decoder_it_makes_pictures(tmp_path: Path) -> None:
    settings = {**SMALL, "img_size": 48, "vae_stride": 16, "vae_embed_dim": 16, "inner_steps": 1}
    dexport.build("mar-b", tmp_path / "out", settings=settings, with_decoder=True, parity=False, profile="ci")
    program = OpenProgram.open(tmp_path / "out").with_settings(steps=3, respacing=4)
    results = program.results(Request(1, (2,)), Draws(0, images=[0]))
    assert results[LATENTS].shape == (1, 16, 3, 3)
    assert results[PICTURES].shape == (1, 48, 48, 3)
