"""Halton-MaskGIT from the build to the ids, at the goldens' sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

import dexport
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.errors import UsageError
from dexport.exporter.recipes import find_recipe, halton_maskgit
from dexport.exporter.trajectory import TorchNetwork, program_of
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.masked import Masked
from dexport.runtime.programs.masked_orders import Transformer, probabilities
from dexport.runtime.programs.program import IDS, Request
from dexport.runtime.session import OnnxSession
from dexport.validate.levels.trajectory import check_trajectory
from tests.golden import Golden, assert_golden, load_golden


def build(golden: Golden, config: dict[str, Any], folder: Path, **options: Any) -> Path:
    save_file(golden.weights, folder / "weights.safetensors")
    checkpoint = str(folder / "weights.safetensors")
    dexport.build("halton-maskgit-s", folder / "out", settings=config, checkpoint=checkpoint, profile="ci", **options)
    return folder / "out"


@pytest.mark.golden
@pytest.mark.parametrize("name", ["halton-transformer", "halton-transformer-s"])
def test_onnx_gives_the_official_logits(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    path = build(golden, golden.config, tmp_path, parity=False)
    logits = dexport.load(path)(**{key: value.numpy() for key, value in golden.inputs.items()})["logits"]
    assert_golden(logits, golden.outputs["logits"].numpy())


def halton_settings(official: dict[str, Any]) -> dict[str, Any]:
    return {
        "order": "halton",
        "steps": official["step"],
        "cfg_scale": 1.0 + official["w"],
        "temperature_start": float(official["sm_temp_min"]),
        "temperature": float(official["sm_temp_max"]),
        "temperature_power": float(official["temp_pow"]),
        "warmup": official["temp_warmup"],
    }


def confidence_settings(official: dict[str, Any]) -> dict[str, Any]:
    return {
        "order": "confidence",
        "steps": official["step"],
        "cfg_scale": 1.0 + official["w"],
        "temperature": float(official["sm_temp"]),
        "warmup": 0,
        "choice_temperature": official["r_temp"],
        "schedule": official["sched_mode"],
    }


def recorded(golden: Golden) -> list[np.ndarray]:
    """The draws of the official loop, in the order in which the program takes them."""
    draws = []
    for step, ids in enumerate(golden.inputs["sampled_ids"].flatten(2)):
        draws.append(ids.numpy())
        if "gumbel" in golden.inputs:
            draws.append(golden.inputs["gumbel"][step].numpy())
    return draws


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "settings"), [("halton-halton-loop", halton_settings), ("halton-confidence-loop", confidence_settings)]
)
def test_the_official_loop_is_replayed_through_onnx(name: str, settings: Any, tmp_path: Path) -> None:
    golden = load_golden(name)
    path = build(golden, golden.config["transformer"], tmp_path, parity=False)
    program = OpenProgram.open(path).with_settings(**settings(golden.config["sampler"]))
    labels = tuple(golden.inputs["labels"].tolist())
    steps = list(program.run(Request(len(labels), labels), Replay(recorded(golden))))
    ids = steps[-1].results[IDS]
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, golden.outputs["final_codes"].flatten(1).numpy())
    official = golden.outputs["mask_per_step"].flatten(2).numpy() == 1
    states, mask = np.stack([step.state for step in steps]), golden.config["transformer"]["codebook_size"]
    if name == "halton-confidence-loop":  # what is unknown after each step
        np.testing.assert_array_equal(states == mask, official)
        return
    drawn = golden.inputs["sampled_ids"].flatten(2).numpy()  # of which each step writes some
    written = np.full_like(states[0], mask)
    for state, some, chosen in zip(states, official, drawn, strict=True):
        written = np.where(some, chosen, written)
        np.testing.assert_array_equal(state, written)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "settings"), [("halton-halton-loop", halton_settings), ("halton-confidence-loop", confidence_settings)]
)
def test_choices_have_the_official_probabilities(name: str, settings: Any) -> None:
    """The logits at each state of the loop, guided and tempered, at the ids that were drawn."""
    golden = load_golden(name)
    config, sampler = golden.config["transformer"], golden.config["sampler"]
    variant = resolve(find_recipe("halton-maskgit-s"), config)
    module = variant.recipe.constructor(**config).eval()
    module.load_state_dict(golden.weights)
    program = program_of(variant)
    assert isinstance(program, Masked)
    program, labels = program.with_settings(**settings(sampler)), tuple(golden.inputs["labels"].tolist())
    network = TorchNetwork(variant, module)
    ids = np.full((2, 64), config["codebook_size"], np.int64)
    draws = recorded(golden)
    for step, state in enumerate(program.run({"transformer": [network]}, Request(2, labels), Replay(draws))):
        transformer = Transformer(network, "model", 2, labels, config["nclass"])
        prediction = transformer(program.scale_at(step, 0.0), ids)
        drawn = golden.inputs["sampled_ids"][step].flatten(1).numpy()
        for image in range(2):
            likely = probabilities(prediction.of(image), program.temperatures()[step])
            found = np.take_along_axis(likely, drawn[image][:, None], axis=1)[:, 0]
            assert_golden(found, golden.outputs["prob_at_sampled"][step, image].flatten().numpy())
        ids = state.state


# Checkpoints, precisions, decoder, commands

SMALL = {
    "input_size": 4,
    "hidden_dim": 24,
    "codebook_size": 12,
    "depth": 1,
    "heads": 2,
    "mlp_dim": 48,
    "nclass": 3,
}


def test_official_training_files_are_read(tmp_path: Path) -> None:
    """The state dict of a compiled module in several processes, beside counters and the optimizer's state."""
    golden = load_golden("halton-transformer-s")
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in golden.weights.items()}
    more = {"iter": 3, "global_epoch": 1, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    torch.save({"model_state_dict": weights, **more}, tmp_path / "ImageNet_256_small.pth")
    variant = resolve(find_recipe("halton-maskgit-s"), golden.config)
    source = open_weights(tmp_path / "ImageNet_256_small.pth", variant.meta_module())
    assert torch.equal(source.read("head.weight", torch.float32), golden.weights["tok_emb.weight"])


def test_half_precision_keeps_the_norms_in_float32(tmp_path: Path) -> None:
    golden = load_golden("halton-transformer-s")
    path = build(golden, golden.config, tmp_path, precision="fp16")
    network = load_bundle(path).network
    assert network.manifest["status"] == "passed"
    nodes = network.entry()["nodes"]
    assert {dtype for name, dtype in nodes.items() if name.endswith("/RMSNormalization")} == {"float32"}
    assert {dtype for name, dtype in nodes.items() if "/MatMul" in name or "/Attention" in name} == {"float16"}
    logits = dexport.load(path)(**{key: value.numpy() for key, value in golden.inputs.items()})["logits"]
    wanted = golden.outputs["logits"].numpy()
    assert np.linalg.norm(logits - wanted) < 3e-3 * np.linalg.norm(wanted)


@pytest.mark.golden
def test_the_text_network_gives_the_official_logits_for_its_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("halton-text")
    monkeypatch.setattr(halton_maskgit, "TEXT_TOKENS", golden.inputs["text"].shape[1])
    save_file(golden.weights, tmp_path / "weights.safetensors")
    options = {"settings": golden.config, "checkpoint": str(tmp_path / "weights.safetensors"), "profile": "ci"}
    dexport.build("halton-maskgit-text", tmp_path / "out", precision="fp16", **options)
    assert load_bundle(tmp_path / "out").status == "passed"
    logits = dexport.load(tmp_path / "out")(**{name: value.numpy() for name, value in golden.inputs.items()})["logits"]
    wanted = golden.outputs["logits"].numpy()
    assert np.linalg.norm(logits - wanted) < 3e-3 * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("halton") / "plain"
    dexport.build("halton-maskgit-t", path, settings=SMALL, profile="ci", precision="fp16")
    return path


def test_random_weights_are_tied_as_the_network_ties_them(plain: Path) -> None:
    assert load_bundle(plain).status == "passed"


@pytest.mark.slow  # other programs' networks are calibrated in every run
def test_quantised_layers_are_calibrated_along_its_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"int8": "w8a8", "calibration_images": 4, "parity": False, "profile": "ci"}
    dexport.build("halton-maskgit-t", tmp_path / "out", settings=SMALL, **options)
    layers = load_bundle(tmp_path / "out").network.manifest["precision"]["layers"]
    assert {path for path, scheme in layers.items() if scheme == "w8a8"} == {
        f"transformer.layers.0.{layer}"
        for layer in ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "ff.w1", "ff.w2", "ff.w3")
    }
    program = OpenProgram.open(tmp_path / "out").with_settings(steps=4)
    assert program.results(Request(1, (2,)), Draws(0, images=[0]))[IDS].shape == (1, 16)


def run(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_ids_are_sampled_from_the_command_line(order: str, plain: Path, tmp_path: Path) -> None:
    options = ("--order", order, "--steps", 4, "--cfg", 1.5, "--temperature", 1.2, "--seed", 3, "--classes", "0,2")
    said = run("sample", plain, "-o", tmp_path / "ids.npy", *options).stdout
    assert "ids [2, 16]" in said and f"4 steps by {order}, cfg 1.5" in said
    program = OpenProgram.open(plain).with_settings(order=order, steps=4, cfg_scale=1.5, temperature=1.2)
    ids = program.results(Request(2, (0, 2)), Draws(3, images=[0, 1]))[IDS]
    np.testing.assert_array_equal(np.load(tmp_path / "ids.npy"), ids)


def test_pictures_need_a_decoder(plain: Path, tmp_path: Path) -> None:
    refused = run("sample", plain, "-o", tmp_path / "out.png", exit_code=2)
    assert "makes ids and has no decoder" in refused.output
    narrow = {"codebook_size": 12, "ch": 32, "ch_mult": [1, 1], "z_channels": 32, "num_res_blocks": 1}
    dexport.build("llamagen-vq16-decoder", tmp_path / "decoder", settings=narrow, latent=(4, 4), parity=False)
    options = ("--decoder", tmp_path / "decoder", "--steps", 4, "--classes", "0,1,2")
    assert "3 images" in run("sample", plain, "-o", tmp_path / "out.png", *options).stdout
    assert Image.open(tmp_path / "out-images" / "00000.png").size == (8, 8)


def test_every_step_is_judged_at_the_states_of_pytorch(plain: Path) -> None:
    report = json.loads(run("validate", plain, "--json", "--no-record", "--steps", 8).stdout)
    assert report["verdict"] == "passed"
    found = report["trajectory"]
    assert len(found["states"]) == len(found["evaluations"]) == len(found["tokens"]["otherwise"]) == 8
    assert found["evaluations"][0]["t"] == 1
    gates = {gate["metric"]: gate["verdict"] for gate in report["gates"]}
    assert gates["evaluation_l2"] == "pass" and "snr" not in gates
    assert report["loss"]["latents_snr_db"] is None


def test_ids_that_fall_otherwise_are_counted(plain: Path) -> None:
    """Logits that are off by a tenth of their size: some draws fall otherwise, and no run hides behind another."""
    bundle = load_bundle(plain)

    class Off:
        def __init__(self, session: Any, error: float) -> None:
            self._session, self._error, self.inputs, self.runner = session, error, session.inputs, "a stand-in"

        def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            logits = self._session(**inputs)["logits"]
            noise = np.random.default_rng(0).standard_normal(logits.shape[1:]).astype(np.float32)
            return {"logits": logits + self._error * logits.std() * noise}

    def program(error: float) -> OpenProgram:
        opened = OpenProgram(bundle, open_graph=lambda network, _: Off(OnnxSession(network.model_path()), error))
        return opened.with_settings(steps=8)

    same = check_trajectory(program(0.0), program(0.0), [0, 1, 2], gate_snr_db=0, gate_l2=0.01)
    assert same.passed and same.tokens is not None and not any(same.tokens.otherwise)
    assert "All" in same.drift and same.tokens.equal == 1
    off = check_trajectory(program(0.1), program(0.0), [0, 1, 2], gate_snr_db=0, gate_l2=0.01)
    assert off.tokens is not None and not off.passed
    assert 0 < sum(off.tokens.otherwise) < 0.5 * off.tokens.decided
    assert "fall otherwise at PyTorch's states" in off.drift and "The free runs part in step" in off.drift
    assert off.worst_evaluation.metrics.relative_l2 == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"proj": 2}, "proj 2"), ({"heads": 600}, "heads 600"), ({"hidden": 48}, "no setting 'hidden'")],
)
def test_what_does_not_fit_is_refused_before_work_starts(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        resolve(find_recipe("halton-maskgit-s"), settings)
