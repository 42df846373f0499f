"""A module of the user's own as the reference: what agrees, what does not, and what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dexport.cli import main

SOURCE = """
import helper
from torch import nn
from dexport.graphs.dit import DiT


class Same(DiT):
    pass


class ReLU(DiT):
    def __init__(self, **config):
        super().__init__(**config)
        for block in self.blocks:
            block.mlp.act = nn.ReLU()


class Bigger(DiT):
    def __init__(self, **config):
        super().__init__(**config)
        self.extra = nn.Linear(2, 2)


class OtherArguments(nn.Module):
    def __init__(self, width):
        super().__init__()


class Half(DiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, :4]


class Pair(DiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y), t


class TwoInputs(DiT):
    def forward(self, x, t):
        return x


def function(**config):
    return DiT(**config)


def number(**config):
    return 3


constant = 3
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("# official code imports its neighbours\n")
    path = tmp_path / "official.py"
    path.write_text(SOURCE)
    return path


def run(bundle: Path, *arguments: object) -> Result:
    command = ["validate", str(bundle), "--no-record", "--level", "forward", *map(str, arguments)]
    return CliRunner().invoke(main, command, catch_exceptions=False)


@pytest.mark.parametrize("name", ["Same", "function"])
def test_the_same_network_agrees(plain: Path, source: Path, name: str) -> None:
    before = list(sys.path)
    result = run(plain, "--against", f"{source}:{name}", "--level", "trajectory", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert f"official.py:{name}" in result.stdout.replace("\n", "").replace("│", "")
    assert sys.path == before


def test_another_network_does_not(plain: Path, source: Path) -> None:
    result = run(plain, "--against", f"{source}:ReLU")
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("official.py", 2, "names no class"),
        ("absent.py:Same", 2, "does not exist"),
        (":Same", 2, "is a folder"),
        ("official.py:Sam", 2, "did you mean Same"),
        ("official.py:Zebra", 2, "its modules are"),
        ("official.py:constant", 2, "is no class"),
        ("official.py:number", 2, "makes a int"),
        ("official.py:OtherArguments", 2, r"missing a required argument: 'width'"),
        ("official.py:Bigger", 4, "extra.weight"),
        ("official.py:Half", 4, "returns [2, 4, 16, 16] for a batch of 2; expected out: [2, 8, 16, 16]"),
        ("official.py:Pair", 4, "returns [2, 8, 16, 16], [2]"),
        ("official.py:TwoInputs", 4, "fails when it is called with (x, t, y)"),
        ("broken.py:Same", 2, "failed to load: ModuleNotFoundError"),
        ("decoder=official.py:Same", 2, "no network 'decoder'"),
    ],
)
def test_what_does_not_fit(plain: Path, source: Path, address: str, code: int, message: str) -> None:
    (source.parent / "broken.py").write_text("import no_such_package\n")
    part, _, rest = address.rpartition("=")
    full = f"{source.parent / rest}" if rest != ":Same" else f"{source.parent}:Same"
    result = run(plain, "--against", f"{part}={full}" if part else full)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
