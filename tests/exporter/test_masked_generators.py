"""MAGE and MaskGIT-r from the build to the graphs, at the goldens' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dexport
from dexport.bundle import MODEL_DATA, load_bundle
from dexport.contract import MEMORY
from dexport.errors import UsageError
from dexport.exporter.options import BuildOptions, Player
from dexport.exporter.recipes import find_recipe
from dexport.exporter.system import plan_system
from dexport.exporter.variant import resolve
from dexport.graphs.maskgit_r import UViT
from dexport.runtime.draws import Draws, Replay, choose
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import IDS, PICTURES, Request
from tests.golden import Golden, assert_golden, load_golden

ONNX = 5e-5
ROOM = 24
STEP, TRANSFORMER, LOOP = map(load_golden, ("recap-maskgit-step", "mage-transformer", "mage-sample-loop"))
VQGAN = load_golden("mage-vqgan").config


def build(path: Path, recipe: str, golden: Golden, **options: Any) -> Path:
    checkpoint = path.with_suffix(".safetensors")
    save_file(golden.weights, checkpoint)
    settings = {**golden.config, **options.pop("settings", {})}
    dexport.build(recipe, path, settings=settings, checkpoint=str(checkpoint), profile="ci", **options)
    return path


@pytest.fixture(scope="module")
def mage_loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("mage") / "loop", "mage-b", LOOP, parity=False)


@pytest.fixture(scope="module")
def mage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graphs, settings = ("full", "light"), {"group_size": 6}
    folder = tmp_path_factory.mktemp("mage")
    return build(folder / "both", "mage-b", TRANSFORMER, graphs=graphs, settings=settings, parity=False)


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, settings = tmp_path_factory.mktemp("maskgit"), {"group_size": ROOM}
    return build(folder / "r", "maskgit-r-256", STEP, settings=settings, parity=False)


def both_passes(path: Path) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """What the full pass gives, and the logits of the light pass for the golden's group of 14, in :data:`ROOM`."""
    given = {name: value.numpy() for name, value in STEP.inputs.items()}
    full = dexport.load(path, graph="full")(ids=given["ids"], labels=given["labels"])
    empty = ((0, 0), (0, ROOM - 14))
    light = dexport.load(path, graph="light")(
        local_ids=np.pad(given["local_ids"], empty),
        group_positions=np.pad(given["group_positions"], empty, constant_values=-1),
        labels=given["labels"],
        **{name: array for name, array in full.items() if name != "logits"},
    )
    return full, light["logits"][:, :14]


@pytest.mark.golden
def test_both_graphs_of_maskgit_r_give_the_official_outputs(maskgit: Path) -> None:
    full, light = both_passes(maskgit)
    assert_golden(full["logits"], STEP.outputs["full_logits"].numpy(), ONNX)
    assert_golden(full["k_layer0"], STEP.outputs["k_layer0"].numpy(), ONNX)
    assert_golden(full["v_layer4"], STEP.outputs["v_last"].numpy(), ONNX)
    assert_golden(light, STEP.outputs["light_logits"].numpy(), ONNX)


def test_a_light_graph_adds_nothing_to_the_weights(maskgit: Path, tmp_path: Path) -> None:
    alone = build(tmp_path / "full", "maskgit-r-256", STEP, graphs=("full",), parity=False)
    assert (alone / MODEL_DATA).read_bytes() == (maskgit / MODEL_DATA).read_bytes()


def test_memories_of_one_graph_are_those_of_the_other(maskgit: Path) -> None:
    graphs = load_bundle(maskgit).network.graphs
    kept, known = (
        [port for port in ports if port.role == MEMORY] for ports in (graphs["full"].outputs, graphs["light"].inputs)
    )
    assert kept == known and len(kept) == 2 * 5


@pytest.mark.slow  # as of MAGE below
def test_maskgit_r_in_half_precision(tmp_path: Path) -> None:
    small = {"img_size": 4, "embed_dim": 24, "depth": 0, "num_heads": 2, "codebook_size": 20, "num_classes": 5}
    dexport.build("maskgit-r-256", tmp_path / "out", settings=small, precision="fp16", profile="ci")
    network = load_bundle(tmp_path / "out").network
    assert network.manifest["status"] == "passed"
    types = {name.rpartition("/")[2]: dtype for name, dtype in network.entry("light")["nodes"].items()}
    assert (types["LayerNormalization"], types["Attention"]) == ("float32", "float16")


@pytest.mark.golden
def test_mage_gives_the_official_outputs(mage: Path) -> None:
    logits = dexport.load(mage, graph="full")(token_ids=TRANSFORMER.inputs["token_ids"].numpy())["logits"]
    assert_golden(logits, TRANSFORMER.outputs["logits"].numpy(), ONNX)


@pytest.mark.slow  # as of MaskGIT-r above
def test_graphs_of_mage_add_nothing_to_the_weights(mage: Path, tmp_path: Path) -> None:
    one = build(tmp_path / "one", "mage-b", TRANSFORMER, parity=False)
    assert (one / MODEL_DATA).read_bytes() == (mage / MODEL_DATA).read_bytes()


@pytest.mark.slow  # twenty seconds: float32 is compared with the goldens, and half precision below
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_graph_passes_its_gate(tmp_path: Path, precision: str) -> None:
    graphs, small = ("model", "full", "light"), {"group_size": 6}
    built = [
        build(tmp_path / "mage", "mage-b", TRANSFORMER, settings=small, graphs=graphs, precision=precision),
        build(tmp_path / "r", "maskgit-r-256", STEP, settings={"group_size": ROOM}, graphs=graphs, precision=precision),
    ]
    assert [load_bundle(path).network.manifest["status"] for path in built] == ["passed"] * 2
    if precision != "bf16":  # which ONNX Runtime cannot run on a CPU
        logits = dexport.load(built[0])(token_ids=TRANSFORMER.inputs["token_ids"].numpy())["logits"]
        assert_golden(logits, TRANSFORMER.outputs["logits"].numpy(), ONNX if precision == "fp32" else 5e-3)


@pytest.mark.slow  # engines of every graph, without a GPU
@pytest.mark.parametrize("recipe", ["mage-b", "maskgit-r-256"])
def test_every_graph_becomes_an_engine(tmp_path: Path, recipe: str) -> None:
    """Heads of a multiple of 8 channels: TensorRT-RTX 1.7 builds no light graph with the 12 of the golden."""
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "group_size": 6}
    small |= {"img_size": 64, "decoder_embed_dim": 32} if recipe == "mage-b" else {"img_size": 4}
    small |= {"decoder_depth": 1, "decoder_num_heads": 4} if recipe == "mage-b" else {}
    graphs, options = ("model", "full", "light"), {"precision": "fp16", "trt": True, "parity": False}
    dexport.build(recipe, tmp_path / "out", settings=small, graphs=graphs, profile="ci", **options)
    assert len(list((tmp_path / "out" / "engines").glob("*.plan"))) == 3


@pytest.mark.golden
def test_mage_in_half_precision(tmp_path: Path) -> None:
    path = build(tmp_path / "half", "mage-b", TRANSFORMER, precision="fp16")
    assert load_bundle(path).network.manifest["status"] == "passed"
    logits = dexport.load(path)(token_ids=TRANSFORMER.inputs["token_ids"].numpy())["logits"]
    assert_golden(logits, TRANSFORMER.outputs["logits"].numpy(), 5e-3)


@pytest.mark.golden
def test_mage_replays_the_official_loop(mage_loop: Path) -> None:
    """Id for id after every step; the last mask of the official loop is of a step that it does not take."""
    given, wanted = LOOP.inputs, LOOP.outputs
    steps = int(LOOP.metadata["num_iter"])
    settings = {"steps": steps, "choice_temperature": float(LOOP.metadata["choice_temperature"])}
    program = OpenProgram.open(mage_loop).with_settings(**settings)
    draws = [each.numpy() for step in range(steps) for each in (given["sampled_ids"][step], given["gumbel"][step])]
    states = list(program.run(Request(2), Replay(draws)))
    assert len(states) == steps
    for step, masking in zip(states[:-1], wanted["masking"].numpy(), strict=False):
        np.testing.assert_array_equal(step.state == program.program.mask, masking.astype(bool))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(states[-1].results[IDS], wanted["final_ids"].numpy())


@pytest.mark.golden
def test_mage_is_as_sure_as_the_official_code(mage_loop: Path) -> None:
    """Log-probabilities of what was drawn, at the ids that the official loop had."""
    given, wanted, session = LOOP.inputs, LOOP.outputs, dexport.load(mage_loop)
    ids = np.full((2, 257), 2024)
    ids[:, 0] = 1100
    for step, masking in enumerate(wanted["masking"].numpy().astype(bool)):
        logits = torch.from_numpy(session(token_ids=ids)["logits"][:, 1:, :1024])
        drawn = given["sampled_ids"][step].long()
        found = logits.log_softmax(dim=-1).gather(2, drawn.unsqueeze(2)).squeeze(2)
        assert_golden(found, wanted["logprobs_at_sampled"][step], ONNX)
        unknown = ids[:, 1:] == 2024
        ids[:, 1:] = np.where(masking, 2024, np.where(unknown, drawn.numpy(), ids[:, 1:]))


def test_recap_by_its_own_reading_runs_on_mage(mage: Path) -> None:
    program = OpenProgram.open(mage).with_settings(steps=8, recap="4:1")
    assert [call.graph for call in program.rehearse()] == ["full"] * 4 + ["full", "light"] * 2
    found = program.results(Request(2), Draws(0, images=[0, 1]))
    assert list(found) == [IDS] and found[IDS].shape == (2, 16) and found[IDS].max() < 64


def test_recap_needs_a_light_graph(mage_loop: Path) -> None:
    with pytest.raises(UsageError, match="needs the graphs full and light, and the bundle has model"):
        OpenProgram.open(mage_loop).with_settings(recap="12:1")


@pytest.mark.golden
@pytest.mark.parametrize("cfg", [None, (1.05, 1.5)])
@pytest.mark.parametrize("recap", ["", "4:1", "0:1"])
def test_maskgit_r_is_the_official_loop(maskgit: Path, recap: str, cfg: tuple[float, float] | None) -> None:
    """In which a light pass has exactly the keys of the places outside of its group, and no empty places."""
    settings = {} if cfg is None else {"cfg_start": cfg[0], "cfg_scale": cfg[1]}
    program = OpenProgram.open(maskgit).with_settings(steps=12, recap=recap, **settings)
    draws = Draws(7, images=[0, 1], record=True)
    found = program.results(Request(2, (3, 8)), draws)
    official = official_loop(torch.tensor([[3], [8]]), 12, recap, cfg, Replay(draws.draws))
    np.testing.assert_array_equal(found[IDS], official.numpy())


@torch.no_grad()
def official_loop(
    labels: torch.Tensor, steps: int, recap: str, cfg: tuple[float, float] | None, draws: Draws
) -> torch.Tensor:
    """``cache_decoding.py`` of ReCAP for the golden's network: one of each call of the network, without caches of
    another size than needed."""
    model, (places, mask) = UViT(**STEP.config).eval(), (64, 96)
    model.load_state_dict(STEP.weights)
    counts = np.floor((1 - np.linspace(0, 1, steps + 1)[:-1] ** 2.5) * places).astype(int)
    schedule = [*(counts[:-1] - counts[1:]), counts[-1]]
    for index, count in enumerate(schedule):
        if count == 0:
            schedule[index], schedule[-1] = 1, schedule[-1] - 1
    before, light = map(int, recap.split(":")) if recap else (steps, 0)
    groups, done = [], 0
    while done < steps:
        size = 1 + (light if done >= before else 0)
        groups.append(list(range(done, min(done + size, steps))))
        done += size
    temperatures = 0.75 + (1 - np.linspace(0, 1, steps) ** 0.5) * 0.25
    strengths = [0.0] * steps if cfg is None else np.linspace(cfg[0] - 1, cfg[1] - 1, steps).tolist()

    def evaluate(x: torch.Tensor, strength: float, kept: Any = (None, None)) -> tuple[torch.Tensor, Any]:
        conditional, first = model._through(x, labels, kept[0])
        null, second = model._through(x, torch.full_like(labels, 10), kept[1])
        return conditional + strength * (conditional - null), (first, second)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        numbers = draws.choices(logits.shape[:2])
        return torch.from_numpy(choose(numbers, logits.softmax(dim=-1).double().numpy()))

    ids = torch.full((2, places), mask)
    for number, group in enumerate(groups):
        logits, kept = evaluate(model.token_emb(ids), strengths[group[0]])
        drawn = draw(logits)
        sure = logits.log_softmax(dim=-1).gather(2, drawn.unsqueeze(2)).squeeze(2)
        sure = torch.where(ids == mask, sure, -torch.inf)
        sure = sure + torch.from_numpy(5.5 * (1 - (number + 1) / len(groups)) * draws.gumbel(ids.shape)).float()
        order = sure.sort(dim=1, descending=True).indices
        count = sum(schedule[step] for step in group)
        chosen, others = order[:, :count], order[:, count:, None, None]
        known = [[tuple(each[:, 1:].take_along_dim(others, 1) for each in pair) for pair in half] for half in kept]
        local, logits, start = torch.full_like(chosen, mask), logits.take_along_dim(chosen.unsqueeze(2), 1), 0
        for step in group:
            end = start + schedule[step]
            local[:, start:end] = draw(logits / temperatures[step])[:, start:end]
            if step != group[-1]:
                logits, _ = evaluate(model.token_emb(local, chosen), strengths[step], known)
            start = end
        ids.scatter_(1, chosen, local)
    return ids


@pytest.mark.parametrize("name", ["mage-b", "mage-l", "maskgit-r-256"])
def test_with_decoder_means_the_vqgan_of_mage(name: str, tmp_path: Path) -> None:
    plan = plan_system(name, BuildOptions(tmp_path, players={"decoder": (Player(),)}))
    decoder = plan.parts[1].variant
    assert decoder is not None and (decoder.recipe.name, decoder.latent) == ("mage-vqgan-decoder", (16, 16))


@pytest.mark.slow  # a decoder of 512 channels
def test_the_tokenizer_decodes_what_is_generated(tmp_path: Path) -> None:
    """Its pictures have black at 0."""
    narrow = {"ddconfig": {**VQGAN["ddconfig"], "ch_mult": [1, 1, 2]}, "n_embed": 96, "embed_dim": 32}
    dexport.build("mage-vqgan-decoder", tmp_path / "decoder", settings=narrow, latent=(4, 4), parity=False)
    small = {**STEP.config, "img_size": 4, "embed_dim": 24, "depth": 2}
    dexport.build("maskgit-r-256", tmp_path / "r", settings=small, parity=False)
    program = OpenProgram.open(tmp_path / "r", players={"decoder": tmp_path / "decoder"}).with_settings(recap="2:1")
    found = program.results(Request(2, (1, 9)), Draws(0, images=[0, 1]))
    images = dexport.load(tmp_path / "decoder")(ids=found[IDS])["decoded_image"]
    expected = np.clip(images * 255, 0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found[PICTURES].astype(int), expected, atol=1)
    assert found[PICTURES].shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("recipe", "settings", "latent", "reason"),
    [
        ("mage-b", {"img_size": 250}, None, "not a multiple of patch_size"),
        ("mage-b", {"img_size": 128}, (16, 16), "contradicts the spatial size 16x16"),
        ("mage-b", {"patch_size": 0}, None, "cells of 0"),
        ("mage-b", {}, (32, 32), "positions for 256"),
        ("mage-b", {"embed_dim": "wide"}, None, "expected int"),
        ("maskgit-r-256", {"num_heads": 5}, None, "embed_dim"),
        ("maskgit-r-256", {"depth": 1.5}, None, "refuses this configuration"),
        ("maskgit-r-256", {"img_size": 8}, (16, 16), "contradicts"),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(
    recipe: str, settings: dict[str, Any], latent: tuple[int, int] | None, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        resolve(find_recipe(recipe), settings, latent)


def test_the_size_of_mage_is_in_pixels() -> None:
    assert resolve(find_recipe("mage-b"), {"img_size": 128}).latent == (8, 8)
    assert resolve(find_recipe("mage-b"), {}, (4, 4)).config["img_size"] == 64
