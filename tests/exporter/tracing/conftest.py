"""A fixture that tests of the trace share."""

from __future__ import annotations

from typing import Any

import pytest
from torch.export import ExportedProgram


@pytest.fixture
def traced_again(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one whenever torch traces a program for the second time."""
    traced: list[None] = []
    original = ExportedProgram.run_decompositions

    def counting(*arguments: Any, **named: Any) -> ExportedProgram:
        traced.append(None)
        return original(*arguments, **named)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counting)
    return traced
