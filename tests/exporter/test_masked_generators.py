"""MAGE and MaskGIT-r from the build to the graphs, at the goldens' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

import dexport
from dexport.bundle import MODEL_DATA, load_bundle
from dexport.contract import MEMORY
from dexport.errors import UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from tests.golden import Golden, assert_golden, load_golden

ONNX = 5e-5
STEP, TRANSFORMER = load_golden("recap-maskgit-step"), load_golden("mage-transformer")


def build(path: Path, recipe: str, golden: Golden, **options: Any) -> Path:
    checkpoint = path.with_suffix(".safetensors")
    save_file(golden.weights, checkpoint)
    settings = {**golden.config, **options.pop("settings", {})}
    dexport.build(recipe, path, settings=settings, checkpoint=str(checkpoint), profile="ci", **options)
    return path


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("maskgit") / "r", "maskgit-r-256", STEP, settings={"group_size": 20})


def both_passes(path: Path) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """What the full pass gives, and the logits of the light pass for the golden's group of 14 in 20 places."""
    given = {name: value.numpy() for name, value in STEP.inputs.items()}
    full = dexport.load(path, graph="full")(ids=given["ids"], labels=given["labels"])
    empty = ((0, 0), (0, 6))
    light = dexport.load(path, graph="light")(
        local_ids=np.pad(given["local_ids"], empty),
        group_positions=np.pad(given["group_positions"], empty, constant_values=-1),
        labels=given["labels"],
        **{name: array for name, array in full.items() if name != "logits"},
    )
    return full, light["logits"][:, :14]


@pytest.mark.golden
def test_both_graphs_of_maskgit_r_give_the_official_outputs(maskgit: Path) -> None:
    assert load_bundle(maskgit).network.manifest["status"] == "passed"
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


@pytest.mark.golden
def test_maskgit_r_in_half_precision(tmp_path: Path) -> None:
    path = build(tmp_path / "half", "maskgit-r-256", STEP, settings={"group_size": 20}, precision="fp16")
    assert load_bundle(path).network.manifest["status"] == "passed"
    _, light = both_passes(path)
    assert_golden(light, STEP.outputs["light_logits"].numpy(), 5e-3)


@pytest.mark.golden
def test_mage_gives_the_official_outputs_and_shares_its_weights(tmp_path: Path) -> None:
    ids = TRANSFORMER.inputs["token_ids"].numpy()
    one = build(tmp_path / "one", "mage-b", TRANSFORMER, parity=False)
    all_three = build(
        tmp_path / "three", "mage-b", TRANSFORMER, settings={"group_size": 6}, graphs=("model", "full", "light")
    )
    assert load_bundle(all_three).network.manifest["status"] == "passed"
    assert (one / MODEL_DATA).read_bytes() == (all_three / MODEL_DATA).read_bytes()
    for graph in ("model", "full"):
        logits = dexport.load(all_three, graph=graph)(token_ids=ids)["logits"]
        assert_golden(logits, TRANSFORMER.outputs["logits"].numpy(), ONNX)


@pytest.mark.golden
def test_mage_in_half_precision(tmp_path: Path) -> None:
    path = build(tmp_path / "half", "mage-b", TRANSFORMER, precision="fp16")
    assert load_bundle(path).network.manifest["status"] == "passed"
    logits = dexport.load(path)(token_ids=TRANSFORMER.inputs["token_ids"].numpy())["logits"]
    assert_golden(logits, TRANSFORMER.outputs["logits"].numpy(), 5e-3)


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
