"""Values that index a table: labels, counts, and times of a folded graph, refused by every session alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dexport
from dexport.bundle import Bundle, load_bundle
from dexport.contract import Port, to_json
from dexport.errors import InputError, UsageError
from dexport.exporter.recipes import find_recipe
from dexport.exporter.variant import resolve
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import check_labels
from dexport.runtime.inputs import Accepted, accepted_of, check_inputs, port_of
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import Request
from dexport.runtime.service import Picture, make_pictures
from dexport.runtime.session import open_session
from dexport.runtime.tensorrt_session import TensorRtSession
from tests.bundles import build_narrow
from tests.runtime.fake_gpu import FakeTensorRt, manifest, write_bundle

NULL = 10
WRONG = [-1, -NULL - 1, -(2**63), NULL + 1, 1000, 2**63 - 1]


def feed(label: int, rows: int = 3) -> dict[str, np.ndarray]:
    labels = np.zeros(rows, np.int64)
    labels[-1] = label
    return {"x": np.zeros((rows, 4, 16, 16), np.float32), "t": np.zeros(rows, np.float32), "y": labels}


@pytest.mark.parametrize("label", WRONG)
def test_a_label_outside_of_the_table_is_refused(plain: Path, label: int) -> None:
    with pytest.raises(UsageError, match=r"^input y has -?[\de.+]+, which is out of range$") as refused:
        dexport.load(plain)(**feed(label))
    assert refused.value.hint == "this model takes 0 to 10"


@pytest.mark.parametrize("label", [0, 9, NULL])
def test_classes_and_the_null_label_are_taken(plain: Path, label: int) -> None:
    assert np.isfinite(dexport.load(plain)(**feed(label))["out"]).all()


@pytest.mark.parametrize("label", [-1, NULL + 1])
def test_fused_guidance_is_held_to_the_same(fused: Path, label: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        dexport.load(fused)(**feed(label), cfg_scale=np.float32(2))


@pytest.mark.parametrize("label", WRONG)
def test_an_engine_checks_what_tensorrt_does_not(tmp_path: Path, trt: FakeTensorRt, label: int) -> None:
    io = manifest()["io"]
    io["inputs"][1]["range"] = [0, NULL]
    given = {"x": np.zeros((2, 4), np.float32), "scale": np.float32(1)}
    with TensorRtSession(write_bundle(tmp_path / "out", io=io).network) as session:
        with pytest.raises(UsageError, match=r"input y has .* out of range"):
            session(**given, y=np.array([0, label]))
        session(**given, y=np.array([0, NULL]))
    assert trt.enqueued == 1


@pytest.mark.parametrize("label", [*WRONG, 10, 2.5, float("nan"), float("inf"), 2**70])
def test_pipelines_and_requests_take_classes_only(plain: Path, label: Any) -> None:
    program = OpenProgram.open(plain).with_settings(steps=2)
    with pytest.raises(UsageError, match="no class"):
        next(program.run(Request(2, (0, label)), Draws(0, images=[0, 1])))
    (answer,) = make_pictures(program, [[Picture(label, 0)]], 1)
    assert isinstance(answer, UsageError)


def test_many_wrong_labels_are_not_all_named() -> None:
    with pytest.raises(UsageError, match=r"^no class (-1, ){9}-1 and 90 more: the model has 3$"):
        check_labels([-1] * 100, 3)
    port = port_of(Port("y", "int64", ("B",)))
    with pytest.raises(UsageError, match=r"has (-1, ){4}-1 and 95 more, which"):
        check_inputs({"y": port}, {"y": np.full(100, -1)}, {"y": Accepted(0, 3)})


@pytest.mark.parametrize(
    ("recipe", "settings", "latent", "expected"),
    [
        ("dit-s-2", {}, None, {"y": [0, 1000]}),
        ("dit-s-2", {"num_classes": 7}, None, {"y": [0, 7]}),
        ("dit-s-2", {"num_classes": 7, "class_dropout_prob": 0}, None, {"y": [0, 6]}),
        ("dico-s", {"num_classes": 1}, None, {"y": [0, 1]}),
        ("diffit-256", {"num_classes": 5, "depth": 1}, None, {"y": [0, 5]}),
        ("terdit-fashion", {}, None, {"y": [0, 10]}),
        ("lit-fashion", {"class_dropout_prob": 0}, None, {"y": [0, 9]}),
        ("dimr-xl-2r", {}, None, {"y": [0, 1000]}),
        ("dimr-xl-2r", {"num_classes": 3}, None, {"y": [0, 2]}),
        ("diffit-image-32", {}, None, {}),
        ("vitok-v2-350m-f16x16-decoder", {"naflex": True}, (2, 3), {"row_idx": [0, 5], "col_idx": [0, 5]}),
        (str(Path(__file__).parents[2] / "examples" / "my_backbone.py"), {"num_classes": 3}, None, {"y": [0, 3]}),
    ],
)
def test_the_manifest_says_which_values(
    recipe: str, settings: dict[str, Any], latent: tuple[int, int] | None, expected: dict[str, list[int]]
) -> None:
    specs = [to_json(spec.port) for spec in resolve(find_recipe(recipe), settings, latent).signature.inputs]
    ranges = {spec["name"]: list(spec["range"]) for spec in specs if "range" in spec}
    assert {name: ranges[name] for name in expected} == expected
    assert set(ranges) <= {*expected, "patch_mask"}


def test_a_folded_graph_takes_its_own_times_only(tmp_path: Path) -> None:
    session = dexport.load(build_narrow(tmp_path / "folded", fold_steps=4))
    for time in (0.0, 333.0, 999.0):
        session(**feed(0) | {"t": np.full(3, time, np.float32)})
    for time in (1.0, 332.9, -1.0, 1e9, np.nan, np.inf):
        with pytest.raises(UsageError, match=r"input t has .* out of range") as refused:
            session(**feed(0) | {"t": np.full(3, time, np.float32)})
        assert refused.value.hint == "this model takes 4 times from 0 to 999"


@pytest.mark.parametrize(
    "field", [{"range": [0]}, {"range": "ab"}, {"range": [0, None]}, {"choices": "x"}, {"choices": [None]}]
)
def test_a_range_that_is_none(plain: Path, field: dict[str, Any]) -> None:
    manifest = copy.deepcopy(dict(load_bundle(plain).manifest))
    label = manifest["networks"]["denoiser"]["graphs"]["model"]["inputs"][2]
    del label["range"]
    label |= field
    with pytest.raises(InputError, match=r"networks\.denoiser\.graphs is not what dexport writes there"):
        open_session(Bundle(plain, manifest).network)
    assert accepted_of([Port("x", "float32", ("B",))]) == {}
