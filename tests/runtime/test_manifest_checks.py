"""Manifests whose hashes are right and whose fields are not: refused before anything is opened, by the field."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from dexport.runtime.pipeline import Pipeline

from dexport.bundle import MANIFEST, Bundle, load_bundle
from dexport.cli import main
from dexport.errors import InputError
from dexport.runtime.engine_checks import read_facts

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[[Change], Bundle]:
    """A bundle whose manifest was changed; nobody hashes that."""

    def change(apply: Change) -> Bundle:
        folder = shutil.copytree(plain, tmp_path / "changed")
        manifest = json.loads((folder / MANIFEST).read_text())
        apply(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return load_bundle(folder)

    return change


def engine(file: str = "model.onnx", **fields: Any) -> dict[str, Any]:
    shapes = {"x": [[1, 4, 16, 16]] * 3}
    facts = {
        "file": file,
        "flavour": "tensorrt",
        "version": "1",
        "targets": ["sm89"],
        "fingerprint": {"shapes": shapes},
    }
    return {"engine": {**facts, **fields}}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sampling.steps", lambda m: m["sampling"].update(steps="50")),
        ("sampling.steps", lambda m: m["sampling"].update(steps=True)),
        ("sampling.decoder", lambda m: m["sampling"].pop("decoder")),
        ("sampling.null_label", lambda m: m["sampling"].update(null_label=2**63)),
        ("sampling.guidance.rule", lambda m: m["sampling"].update(guidance={})),
        ("sampling.class_names", lambda m: m["sampling"]["class_names"].pop()),
        ("io.inputs", lambda m: m["io"].update(inputs=[])),
        ("io.inputs[0].shape", lambda m: m["io"]["inputs"][0].update(shape=["B", 4])),
        ("io.outputs[0].name", lambda m: m["io"]["outputs"][0].update(name=None)),
        ("batch.max", lambda m: m.pop("batch")),
    ],
)
def test_a_field_that_sampling_needs_is_named(field: str, change: Change, changed: Callable[[Change], Bundle]) -> None:
    with pytest.raises(InputError, match=re.escape(f"is incomplete: {field} is missing, or")):
        Pipeline(changed(change))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("engine.file", engine("../evil.plan")),
        ("engine.file", engine("/tmp/evil.plan")),
        ("engine.flavour", engine(flavour=1)),
        ("engine.targets[0]", engine(targets=[89])),
        ("engine.fingerprint.shapes.x", engine(fingerprint={"shapes": {"x": [[1], [1, 2], [1]]}})),
    ],
)
def test_an_engine_that_is_not_hashed_or_not_described_is_refused(
    field: str, fields: dict[str, Any], changed: Callable[[Change], Bundle]
) -> None:
    with pytest.raises(InputError, match=re.escape(f"is incomplete: {field} is missing, or")):
        read_facts(changed(lambda manifest: manifest.update(fields)))


@pytest.mark.parametrize("name", ["../other", "/tmp", "missing", 3])
def test_a_part_that_is_not_hashed_is_refused(name: Any, changed: Callable[[Change], Bundle]) -> None:
    bundle = changed(lambda manifest: manifest.update(parts=[name]))
    with pytest.raises(InputError, match=r"part .* is not in it"):
        assert bundle.parts


def test_brackets_in_a_manifest_are_shown_as_they_are(changed: Callable[[Change], Bundle]) -> None:
    bundle = changed(lambda manifest: manifest.update(name="[/x]", dexport="[red]\x1b[2J"))
    shown = CliRunner().invoke(main, ["info", str(bundle.path)])
    assert shown.exit_code == 0
    assert "DiT [/x]," in shown.stdout
    assert "[red]\\x1b[2J" in shown.stdout
