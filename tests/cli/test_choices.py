"""The lists and defaults that the command line shows without torch are those of the code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dexport import choices
from dexport.cli import main
from dexport.errors import UsageError
from dexport.exporter.options import BYTES_PER_WEIGHT, BuildOptions
from dexport.exporter.quantize.carriers import CARRIERS
from dexport.plugins.op import DTYPES
from dexport.profiles import builtin_profiles
from dexport.runtime.session import PROVIDERS, TENSORRT
from dexport.validate.compare.diff import EXAMPLE, TRAJECTORY


def test_lists_are_those_of_the_code() -> None:
    assert (*choices.PRECISIONS, choices.AUTO) == tuple(BYTES_PER_WEIGHT)
    assert tuple(CARRIERS) == choices.CARRIERS
    assert tuple(PROVIDERS) == choices.PROVIDERS
    assert choices.FLAVOURS[0] == TENSORRT
    assert choices.DTYPES == DTYPES
    assert choices.STATES == (EXAMPLE, TRAJECTORY)


def test_the_help_lists_the_profiles() -> None:
    shown = " ".join(CliRunner().invoke(main, ["build", "--help"]).stdout.split())
    assert f"{', '.join(builtin_profiles())}, or a TOML file" in shown


def test_defaults_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stop(_: str, output: Path, *, listener: object, stitch: str | None, **arguments: Any) -> None:  # noqa: ARG001
        asked.update(arguments, output=output)
        raise UsageError("stopped")

    monkeypatch.setattr("dexport.validate.build.build_and_validate", stop)
    CliRunner().invoke(main, ["build", "dico-s"])
    words = {"with_decoder": False, "guidance": "none"}  # that a build takes in the place of players
    assert {name: asked.pop(name) for name in words} == words
    assert BuildOptions(**asked) == BuildOptions(Path("dico-s"))
    assert {field.name for field in fields(BuildOptions)} - set(asked) == {"players"}
